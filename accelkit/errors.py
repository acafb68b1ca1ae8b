"""What accelkit raises and warns with: one line that says what was given and what to do."""

import signal


class AccelkitError(ValueError):
    """A user's input that cannot be used: what was given, what was expected, what to do."""


class AccelkitWarning(UserWarning):
    """Something that works but is probably not what was meant."""


class Stopped(Exception):  # noqa: N818 - no error: the run can go on
    """A run was asked to end by a signal, and left a checkpoint.

    Attributes:
        signum: the signal.
    """

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(
            f"stopped by {signal.Signals(signum).name} after step {step}; "
            "go on with --resume latest"
        )
        self.signum = signum
