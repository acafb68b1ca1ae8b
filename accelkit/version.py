"""The version of accelkit."""

__version__ = "0.2.0"
