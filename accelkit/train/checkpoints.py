"""Checkpoints of a run through accelerate: what is written, and how a run goes on from one."""

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
"""What a checkpoint holds beside accelerate's files: the teacher and the rate's schedule."""


def save(
    run: RunDirectory, step: int, keep: int, accelerator: Accelerator, own: dict[str, Any]
) -> None:
    """Write the checkpoint of ``step``, keeping the newest ``keep``.

    Args:
        run: the run's open directory.
        step: steps done.
        keep: 0 for all.
        accelerator: holds what was prepared.
        own: what else has a ``state_dict``, by name.
    """
    main, barrier = accelerator.is_main_process, accelerator.wait_for_everyone
    with run.writing(step, keep, main, barrier) as folder:
        with _no_notice_of_sharing():
            accelerator.save_state(str(folder))
        if main:
            states = {name: part.state_dict() for name, part in own.items()}
            torch.save({"step": step, **states}, folder / LOOP_STATE)


def restore(run: RunDirectory, accelerator: Accelerator, adapted: bool, own: dict[str, Any]) -> int:
    """Go on from the latest checkpoint; return its step, 0 without one.

    Args:
        run, accelerator, own: as :func:`save` takes them.
        adapted: whether checkpoints hold the trained weights only.

    Raises:
        AccelkitError: it cannot be read, is damaged, or is the one of another step.
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
        # earlier versions recorded the step as the rate's only
        if (found := state.get("step", state["rates"]["last_epoch"])) != step:
            raise AccelkitError(f"it is the one of step {found} under another name")
        accelerator.load_state(str(folder), strict=not adapted)
        for name, part in own.items():
            part.load_state_dict(state[name])
    except Exception as error:
        why = " ".join(str(error).split())  # torch and accelerate say it in several lines
        raise AccelkitError(
            f"cannot read the checkpoint {folder}: {why}; remove it to go on from the one before"
        ) from error
    return step


def keep_only_trained(model: nn.Module, accelerator: Accelerator, stack: ExitStack) -> None:
    """Leave what is frozen out of checkpoints, as long as ``stack`` is entered."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}

    def strip(models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
        for state in weights:
            for name in [n for n in state if n.removeprefix("module.") not in trained]:
                del state[name]

    stack.callback(accelerator.register_save_state_pre_hook(strip).remove)


@contextmanager
def _no_notice_of_sharing() -> Iterator[None]:
    """Keep back accelerate's line that names every shared tensor.

    Equal embedders are one while training, on purpose, and are one again when it goes on.
    """

    def others(record: logging.LogRecord) -> bool:
        return "Removed shared tensor" not in str(record.msg)

    logger = logging.getLogger("accelerate.utils.other")
    logger.addFilter(others)
    try:
        yield
    finally:
        logger.removeFilter(others)
