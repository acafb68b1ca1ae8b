"""What accelkit raises and warns with: one line that says what was given and what to do."""


class AccelkitError(ValueError):
    """A user's input that cannot be used: what was given, what was expected, what to do."""


class AccelkitWarning(UserWarning):
    """Something that works but is probably not what was meant."""
