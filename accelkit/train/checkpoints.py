"""Checkpoints of a run through accelerate: writing one, and resuming from one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from accelkit.errors import AccelkitError
from accelkit.train.rundir import SUMS, RunDirectory

LOOP_STATE = "loop.pt"
"""File of the state that accelerate does not save: the teacher and the rate's schedule."""


def save(
    run: RunDirectory, step: int, keep: int, accelerator: Accelerator, own: dict[str, Any]
) -> None:
    """Write the checkpoint of ``step``, keeping the newest ``keep``.

    Args:
        run: the run's open directory.
        step: number of steps done.
        keep: number of checkpoints to keep, 0 for all.
        accelerator: accelerator that prepared the model and the optimiser.
        own: other objects with a ``state_dict``, by name.
    """
    main, barrier = accelerator.is_main_process, accelerator.wait_for_everyone
    with run.writing(step, keep, main, barrier) as folder:
        with _without_sharing_warnings():
            accelerator.save_state(str(folder))
        if main:
            states = {name: part.state_dict() for name, part in own.items()}
            torch.save({"step": step, **states}, folder / LOOP_STATE)


def restore(run: RunDirectory, accelerator: Accelerator, adapted: bool, own: dict[str, Any]) -> int:
    """Load the latest checkpoint; return its step, 0 without one.

    Args:
        run, accelerator, own: as in :func:`save`.
        adapted: whether checkpoints hold the trained weights only.

    Raises:
        AccelkitError: the checkpoint cannot be read, is damaged, or belongs to another step.
    """
    latest = run.latest()
    if latest is None:
        return 0
    step, folder = latest
    try:
        checked = run.check(folder)
        state = torch.load(folder / LOOP_STATE, map_location="cpu", weights_only=True)
        if "step" in state and not checked:
            raise AccelkitError(f"{SUMS} is missing")
        # Earlier versions recorded the step with the rate's schedule only.
        if (found := state.get("step", state["rates"]["last_epoch"])) != step:
            raise AccelkitError(f"it belongs to step {found}")
        accelerator.load_state(str(folder), strict=not adapted)
        for name, part in own.items():
            part.load_state_dict(state[name])
    except Exception as error:
        why = " ".join(str(error).split())  # torch and accelerate use several lines
        raise AccelkitError(
            f"cannot read the checkpoint {folder}: {why}; remove it to go on from the one before"
        ) from error
    return step


def keep_only_trained(model: nn.Module, accelerator: Accelerator, stack: ExitStack) -> None:
    """Leave frozen weights out of checkpoints until ``stack`` is closed."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}

    def strip(models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
        for state in weights:
            for name in [n for n in state if n.removeprefix("module.") not in trained]:
                del state[name]

    stack.callback(accelerator.register_save_state_pre_hook(strip).remove)


@contextmanager
def _without_sharing_warnings() -> Iterator[None]:
    """Suppress accelerate's warning about shared tensors.

    Equal embedders share their tensors while training, on purpose, and again after resuming.
    """

    def others(record: logging.LogRecord) -> bool:
        return "Removed shared tensor" not in str(record.msg)

    logger = logging.getLogger("accelerate.utils.other")
    logger.addFilter(others)
    try:
        yield
    finally:
        logger.removeFilter(others)
