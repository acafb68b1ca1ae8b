"""results.json: the results of a benchmark, as described by results.schema.json."""

from __future__ import annotations

import math
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from accelkit.errors import AccelkitError
from accelkit.files.documents import read_json
from accelkit.files.writing import AGAIN, read_record, write_record

SCHEMA = 2
RESULTS = "results.json"
SCHEMA_FILE = Path(__file__).with_name("results.schema.json")

_PACKAGES = (
    "accelkit",
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "numpy",
    "scipy",
    "triton",
    "cache-dit",
    "torch-fidelity",
)
_TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "number": (int, float),
    "integer": int,
    "null": type(None),
}


def write_results(directory: Path, results: dict[str, Any]) -> Path:
    """Write ``results.json`` atomically and return its path.

    A figure that is not finite is written as null, since JSON has neither infinities nor NaN.
    """
    path = directory / RESULTS
    write_record(path, _finite(results), AGAIN)
    return path


def read_results(path: Path) -> dict[str, Any]:
    """Return the content of a ``results.json``, given the file or its directory.

    Raises:
        AccelkitError: the file cannot be read, is damaged, has another schema version, or does not
            follow ``results.schema.json``.
    """
    path = path / RESULTS if path.is_dir() else path
    results = read_record(path, "remove it, and the same accelkit bench writes it again")
    found = results.get("schema") if isinstance(results, dict) else None
    if isinstance(found, int) and found != SCHEMA:
        raise AccelkitError(
            f"{path} is of schema version {found}, this accelkit reads version {SCHEMA}; "
            "measure again with --overwrite or another -o, or use the accelkit that wrote it"
        )
    wrong = next(violations(results), None)
    if wrong is not None:
        raise AccelkitError(
            f"{path} holds no results of accelkit bench ({wrong}); measure again with --overwrite "
            "or another -o"
        )
    seen: set[tuple[Any, ...]] = set()
    for row in results["rows"]:
        if (key := identity(row)) in seen:
            raise AccelkitError(
                f"{path} has more than one row of {' '.join(map(str, key))}; remove all but one"
            )
        seen.add(key)
    return results


def identity(row: dict[str, Any]) -> tuple[str, str, str, int]:
    """Return the key of a row: method, weights, sampler, steps."""
    return row["method"], row["weights"], row["sampler"], row["steps"]


def blank_row() -> dict[str, Any]:
    """Return a row before any measurement: every field null, ``missing`` empty."""
    fields = _schema()["properties"]["rows"]["items"]["properties"]
    return {**dict.fromkeys(fields), "missing": {}}


def machine() -> dict[str, Any]:
    """Return the machine that figures depend on: processor, threads, GPU and versions."""
    import torch

    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "packages": {name: installed(name) for name in _PACKAGES},
    }


def commit() -> str | None:
    """Return the commit of the sources, with ``-dirty`` if they changed; None outside git."""
    sources = Path(__file__).parents[2]
    if not (sources / ".git").exists():  # an installed package may be inside a user's repository
        return None
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(describe, cwd=sources, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def violations(value: Any, schema: dict[str, Any] | None = None, at: str = "") -> Iterator[str]:
    """Yield the violations of ``schema`` in ``value``. Default: the schema of results.json.

    Only the part of JSON Schema that results.schema.json uses is implemented, which saves a
    dependency. Numbers have to be finite.
    """
    schema = _schema() if schema is None else schema
    at = at or "the file"
    if "const" in schema and value != schema["const"]:
        yield f"{at} is {value!r}, expected {schema['const']!r}"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{at} is {value!r}, expected one of {', '.join(schema['enum'])}"
    if "type" in schema and not _is(value, schema["type"]):
        yield f"{at} is {value!r:.40}, expected {_worded(schema['type'])}"
    elif isinstance(value, dict):
        yield from _violations_of_object(value, schema, at)
    elif isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", math.inf):
            yield f"{at} has {len(value)} entries, expected {schema.get('minItems', 0)}"
        for index, item in enumerate(value):
            yield from violations(item, schema.get("items", {}), f"{at}[{index}]")
    elif isinstance(value, str):
        if not re.search(schema.get("pattern", ""), value):
            yield f"{at} is {value!r}, expected the form {schema['pattern']}"
    elif isinstance(value, int | float) and value < schema.get("minimum", -math.inf):
        yield f"{at} is {value}, expected at least {schema['minimum']}"


def _violations_of_object(value: dict[str, Any], schema: dict[str, Any], at: str) -> Iterator[str]:
    prefix = "" if at == "the file" else f"{at}."
    known = schema.get("properties", {})
    more = schema.get("additionalProperties", True)
    for name in schema.get("required", []):
        if name not in value:
            yield f"{prefix}{name} is missing"
    for name, item in value.items():
        if name in known:
            yield from violations(item, known[name], prefix + name)
        elif more is False:
            yield f"{prefix}{name} is unknown"
        elif isinstance(more, dict):
            yield from violations(item, more, prefix + name)


def _is(value: Any, kinds: str | list[str]) -> bool:
    if isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
        return False
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # to JSON, 1.0 is an integer
    return any(isinstance(value, _TYPES[k]) for k in ([kinds] if isinstance(kinds, str) else kinds))


def _worded(kinds: str | list[str]) -> str:
    return kinds if isinstance(kinds, str) else " or ".join(kinds)


@cache
def _schema() -> dict[str, Any]:
    return read_json(SCHEMA_FILE)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def installed(name: str) -> str | None:
    """Return the version of an installed package, None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
