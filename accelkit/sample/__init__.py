"""Sampling with per-image seeds, for the command line and for measuring."""
