"""The two results that arbitrary input may have: a value, or a refusal in one line."""

from accelkit.errors import LONGEST, AccelkitError


def value_or_refusal(read, *arguments):
    """Return the value that is read, or None if it is refused; no other error may be raised."""
    try:
        return read(*arguments)
    except AccelkitError as error:
        message = str(error)
    assert message.isprintable()
    assert 0 < len(message) <= LONGEST
    return None
