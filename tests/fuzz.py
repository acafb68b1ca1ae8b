"""What a test of anything at all may end in."""

from accelkit.errors import LONGEST, AccelkitError


def value_or_refusal(read, *arguments):
    """Return what is read, or None where it is refused in one line; nothing else may be raised."""
    try:
        return read(*arguments)
    except AccelkitError as error:
        message = str(error)
    assert message.isprintable()
    assert 0 < len(message) <= LONGEST
    return None
