"""JSON and TOML from users: any content is read, or refused in one line."""

from __future__ import annotations

import json
import os
import stat
import tomllib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from accelkit.errors import AccelkitError

_LARGEST = 64 * 2**20
_DEEPEST = 100
"""Python's parsers, and recursive code that uses the result, raise RecursionError near 1,000."""
_BITS = 64
_TOO_DEEP = f"it is nested more than {_DEEPEST} deep"
_TOO_WIDE = f"it holds a whole number of more than {_BITS} bits"


def read_json(path: str | Path, what: str = "") -> Any:
    """Return the content of a JSON file.

    NaN and infinities are accepted in Python's spelling, because some diffusers configs hold them.

    Args:
        path: the file.
        what: the file in a message, e.g. ``"the recipe"``; the path follows.

    Raises:
        AccelkitError: the file is missing, no regular file, larger than 64 MiB or no JSON in UTF-8;
            it has a key twice, is nested more than 100 deep or holds a number of more than 64 bits.
    """
    return _read(Path(path), what, parse_json)


def read_object(path: str | Path, what: str = "") -> dict[str, Any]:
    """Return the content of a JSON file that must hold an object; see :func:`read_json`."""
    content = read_json(path, what)
    if not isinstance(content, dict):
        raise AccelkitError(
            f"cannot read {_called(path, what)}: it holds {_kind(content)}, expected an object"
        )
    return content


def read_toml(path: str | Path, what: str = "") -> dict[str, Any]:
    """Return the content of a TOML file; see :func:`read_json` for arguments and errors."""
    return _read(Path(path), what, _parse_toml)


def parse_json(text: str) -> Any:
    """Return the content of a JSON text, such as a line of a file.

    Raises:
        ValueError: for the reasons of :func:`read_json`, without the name of a file.
    """
    return _parse(text, partial(json.loads, object_pairs_hook=_object))


def _parse_toml(text: str) -> dict[str, Any]:
    return _parse(text, tomllib.loads)


def _parse(text: str, load: Callable[[str], Any]) -> Any:
    try:
        return _bounded(load(text))
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except ValueError as error:
        if "int_max_str_digits" in str(error):  # Python's advice is for programmers
            raise ValueError(_TOO_WIDE) from None
        raise


def check_regular(path: str | Path) -> None:
    """Raise OSError unless ``path`` is a regular file: opening a pipe may wait forever."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        raise OSError(f"it is {kinds.get(stat.S_IFMT(mode), 'a device')}, expected a file")


def is_utf8(path: str | Path) -> bool:
    """Return whether a path is valid UTF-8; most libraries cannot open others."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _read(path: Path, what: str, parse: Callable[[str], Any]) -> Any:
    try:
        check_regular(path)
        if (size := path.stat().st_size) > _LARGEST:
            raise ValueError(f"it has {size:,} bytes, expected at most {_LARGEST:,}")
        return parse(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        reason = f"it is not UTF-8 text, from byte {error.start} on"
    except OSError as error:
        reason = error.strerror or str(error)
    except ValueError as error:
        reason = str(error)
    raise AccelkitError(f"cannot read {_called(path, what)}: {reason}")


def _called(path: str | Path, what: str) -> str:
    return f"{what} {path}".strip()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it names {twice!r} twice in one object")
    return found


def _bounded(content: Any) -> Any:
    """Return ``content``; refuse values that would raise an error far from the file."""
    level, depth = [content], 0
    while level:
        if (depth := depth + 1) > _DEEPEST:
            raise ValueError(_TOO_DEEP)
        if any(isinstance(v, int) and v.bit_length() > _BITS for v in level):
            raise ValueError(_TOO_WIDE)
        level = [part for value in level for part in _parts(value)]
    return content


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _kind(value: Any) -> str:
    kinds = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")
