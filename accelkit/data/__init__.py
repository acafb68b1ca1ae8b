"""Images to train on and to measure against: sources, transforms and cached latents."""
