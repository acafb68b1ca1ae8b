"""Checkpoint layouts of the original repositories, to and from diffusers' models."""
