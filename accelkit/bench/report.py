"""What a comparison leaves behind: results.json and a plot."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from accelkit.files import write_json

SCHEMA = 1
RESULTS, PLOT = "results.json", "results.png"
_PACKAGES = ("accelkit", "torch", "diffusers", "transformers", "accelerate", "numpy", "triton")


def machine() -> dict[str, Any]:
    """Return what figures depend on: processor, threads, GPU and versions."""
    import torch

    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def write_results(directory: Path, protocol: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    """Write ``results.json``: schema, protocol with command and machine, rows. Return its path."""
    command = " ".join(["accelkit", *sys.argv[1:]])
    full = {"command": command, **protocol, "machine": machine()}
    path = directory / RESULTS
    write_json(path, {"schema": SCHEMA, "protocol": full, "rows": rows})
    return path


def plot(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    """Draw quality against time as a PNG; bars of the time alone if there is no quality figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title)
    names = [row["schedule"] + (" tuned" if row["tuned"] else "") for row in rows]
    seconds = [row["seconds"] for row in rows]
    if all(row["fid"] is not None for row in rows):
        for row, name in zip(rows, names, strict=True):
            marker, color = ("o", "C0") if row["tuned"] else ("x", "C3")
            if row["ideal_saving"] == 0:
                marker, color = "s", "0.3"
            axes.scatter(row["seconds"], row["fid"], s=48, color=color, marker=marker)
            axes.annotate(name, (row["seconds"], row["fid"]), (6, 4), textcoords="offset points")
        axes.set(xlabel="seconds per batch", ylabel="Fréchet distance", yscale="log")
        axes.margins(0.15)
    else:
        axes.barh(names[::-1], seconds[::-1])
        axes.set(xlabel="seconds per batch")
    axes.grid(alpha=0.3)
    part = path.with_name(path.name + ".partial")
    figure.savefig(part, format="png")
    part.replace(path)


def _version(name: str) -> str | None:
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
