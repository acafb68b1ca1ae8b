"""Small files that are whole or absent, and what to say when there is no room for them."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelkit.errors import AccelkitError

RESUME, AGAIN = "go on with --resume latest", "run the same command again"
"""What to do where there was no room: for a run that is resumed, and for one that goes on alone."""


def read_json(path: Path) -> Any:
    """Return a JSON file's content; AccelkitError if it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AccelkitError(f"cannot read {path}: {error}") from error


def write_json(path: Path, data: Any, go_on: str = RESUME) -> None:
    """Write ``data`` beside ``path`` and rename it into place; see :func:`explain_full_disk`."""
    with explain_full_disk(path, go_on):
        part = path.with_name(path.name + ".partial")
        try:
            part.write_text(json.dumps(data, indent=2) + "\n")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def explain_full_disk(path: Path, go_on: str = RESUME) -> Iterator[None]:
    """Turn a write that found no room into an AccelkitError that names the place and what to do."""
    try:
        yield
    except Exception as error:  # safetensors and torch raise errors of their own
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        words = (
            "no space left",
            "quota exceeded",
            "file too large",
            "file write failed",
            "unexpected pos",
        )
        if full or any(word in str(error).lower() for word in words):
            raise AccelkitError(
                f"no room to write {path} ({error}); free some space and {go_on}: "
                "what was written before is intact"
            ) from error
        raise
