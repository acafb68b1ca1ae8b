"""The settings of a fine-tuning that is resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelkit.bench.protocol import listed
from accelkit.errors import AccelkitError
from accelkit.preset_names import SEQUENTIAL
from accelkit.schedule import Schedule
from accelkit.train.rundir import RunDirectory


def stored_finetuning(folder: Path) -> dict[str, Any]:
    """Return the settings of the run in a directory, {} for a run without settings.

    The keys are ``schedule`` and ``baselines``, and, with settings by name, ``source``,
    ``training``, ``protocol`` and ``sampling``.

    Raises:
        AccelkitError: there is no run, or one of another command.
    """
    run = RunDirectory(folder).stored()
    if run == {}:
        return {}
    try:
        protocol = run["evaluation"]
        sampler, _, steps = protocol["samplers"][0].rpartition(":")
        return {
            "schedule": _spelled(run["schedule"]),
            "baselines": ";".join(listed(protocol["methods"])[1:]),
            "source": dict(run["source"]),
            "training": dict(run["train"]),
            "protocol": {name: protocol[name] for name in ("images", "batch_size")},
            "sampling": {
                "sampler": sampler,
                "steps": int(steps),
                "guidance": protocol["guidance"],
                "guidance_channels": protocol["guidance_channels"],
            },
        }
    except AccelkitError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise AccelkitError(
            f"the run in {folder} is not one of accelkit finetune; resume it with the command that "
            "began it"
        ) from error


def _spelled(stored: dict[str, Any]) -> str:
    """Return a schedule's name if the name still stands for the schedule, else its intervals."""
    schedule = Schedule.from_dict(stored)
    try:
        named = Schedule.parse(schedule.name, schedule.layers, schedule.family or SEQUENTIAL)
    except AccelkitError:  # the name of a file, for example
        return str(schedule)
    return schedule.name if named == schedule else str(schedule)
