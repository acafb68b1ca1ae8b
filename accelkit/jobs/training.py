"""The frame of a training run: its directory, accelerator, identity and progress."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from accelerate.tracking import get_available_trackers

from accelkit.backbones.conditioning import Item
from accelkit.data.sources import ImageSource
from accelkit.errors import AccelkitError
from accelkit.jobs.outputs import save_picture
from accelkit.jobs.reporter import Reporter
from accelkit.jobs.settings import Run
from accelkit.sample.generate import Sampling, generate, grid
from accelkit.sample.many import explain_lost_process
from accelkit.subject import Subject
from accelkit.train.config import TrainConfig
from accelkit.train.loop import Progress, Watch, make_accelerator
from accelkit.train.rundir import RunDirectory

MAY_DIFFER = frozenset({"evaluation"})
"""Settings that may change when a run is resumed, because they do not affect the weights."""


@contextmanager
def claimed(
    settings: dict[str, Any], config: TrainConfig, where: Run
) -> Iterator[tuple[RunDirectory, Any]]:
    """Open a run's directory and its accelerator, and close both at the end."""
    known = sorted(str(getattr(t, "value", t)) for t in get_available_trackers())
    if where.report_to and where.report_to not in known:
        raise AccelkitError(
            f"--report-to {where.report_to} is not installed or unknown; "
            f"installed: {', '.join(known) or 'none'}"
        )
    accelerator = make_accelerator(config, log_with=where.report_to, project_dir=str(where.output))
    run = RunDirectory(where.output)
    try:
        with explain_lost_process(accelerator.num_processes):
            if accelerator.is_main_process:
                run.open(
                    settings,
                    resume=where.resume,
                    overwrite=where.overwrite,
                    free=MAY_DIFFER,
                    defaults={"train": TrainConfig().to_dict()},
                )
            accelerator.wait_for_everyone()
            if where.report_to:
                accelerator.init_trackers("tracking", config=config.to_dict())
            yield run, accelerator
    except AccelkitError:
        if accelerator.is_main_process and not where.resume:
            run.abandon()  # so that the corrected command can use the directory
        raise
    finally:
        run.close()
        # not by accelerator.end_training, which would end the process group that later jobs need
        for tracker in accelerator.trackers:
            tracker.finish()


def identify(run: RunDirectory, accelerator: Any, images: ImageSource, **others: str) -> None:
    """Record the data and the fingerprints of other inputs, or compare them with the record.

    Raises:
        AccelkitError: the run began with other images, labels or other inputs.
    """
    if not accelerator.is_main_process:
        return
    labels = b"" if images.labels is None else images.labels.tobytes()
    known = {"images": images.fingerprint, "labels": hashlib.sha256(labels).hexdigest()}
    run.identify(known | others)


def announce(images: ImageSource, where: Run, accelerator: Any, reporter: Reporter) -> None:
    """Report what a run trains on, unless it is resumed."""
    if accelerator.is_main_process and not where.resume:
        reporter.say(f"training on {images.summary()}")


def watch(
    subject: Subject,
    items: Sequence[Item],
    config: TrainConfig,
    where: Run,
    accelerator: Any,
    reporter: Reporter,
) -> Watch:
    """Return the callbacks of the training loop: progress, trackers and preview pictures."""

    def on_step(progress: Progress) -> None:
        note = f"loss {progress.loss:.4f}  {progress.samples_per_second:.0f} samples/s"
        reporter.advance("training", progress.step, config.steps, note)
        if where.report_to:
            values = {k: v for k, v in vars(progress).items() if k != "step"}
            accelerator.log(values, step=progress.step)

    def preview(step: int, model: Any) -> None:
        chosen = [items[i % len(items)] for i in range(16)]
        path = where.output / "previews" / f"step-{step:08d}.png"
        how = Sampling(steps=20)
        save_picture(grid(generate(subject, chosen, list(range(16)), how)), path)

    return Watch(where.checkpoint_every, where.keep, on_step, preview, where.preview_every)
