"""Files: whole or absent, checked when they are read back."""
