"""What a retrofit leaves behind, and every way to open a model."""
