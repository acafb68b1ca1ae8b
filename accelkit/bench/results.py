"""results.json: the results of a benchmark, as described by results.schema.json."""

from __future__ import annotations

import math
import os
import platform
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


def violations(results: Any) -> Iterator[str]:
    """Yield each way in which ``results`` break ``results.schema.json``, in one short line."""
    for error in _validator().iter_errors(results):
        shown = f"{error.instance!r:.40}"
        message = error.message.replace(repr(error.instance), shown)
        yield f"{error.json_path[2:] or 'the file'}: {message:.200}"


@cache
def _validator() -> Any:
    """Return a validator that also refuses NaN and infinities, which JSON does not have."""
    from jsonschema import Draft202012Validator
    from jsonschema.validators import extend

    def finite(checker: Any, value: Any) -> bool:
        known = Draft202012Validator.TYPE_CHECKER.is_type(value, "number")
        return known and math.isfinite(value)

    types = Draft202012Validator.TYPE_CHECKER.redefine("number", finite)
    return extend(Draft202012Validator, type_checker=types)(_schema())


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
