"""The training loop: a student on its schedule, followed by its EMA teacher.

Algorithm 1 of Moon et al. 2024 (ASE): every sample draws a timestep and runs as many blocks as the
schedule gives its noise level; the result is the moving average of the weights. All depths of a
batch share one pass, which samples leave when they exit, so that a step costs the schedule's mean
depth. With a full schedule the same loop trains from scratch.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn

from accelkit.artifact.adapter import Adapter
from accelkit.errors import AccelkitError, Stopped
from accelkit.noise.processes import Density, ForwardProcess
from accelkit.noise.schedulers import forward_process
from accelkit.runtime.switch import enable
from accelkit.runtime.taps import Taps
from accelkit.sample.many import explain_lost_process
from accelkit.schedule import Schedule
from accelkit.subject import Subject
from accelkit.train import checkpoints, launch, lora
from accelkit.train.config import TrainConfig
from accelkit.train.dvd import OwnHeads, supervision_for
from accelkit.train.rundir import RunDirectory
from accelkit.train.samples import Conditions, Labels, Samples
from accelkit.train.step import Step

make_accelerator = launch.make_accelerator


@dataclass(frozen=True)
class Progress:
    """The figures of a training step.

    Attributes:
        step: steps done.
        loss: loss over all processes.
        grad_norm: norm of the gradient before clipping.
        learning_rate: learning rate of the next step, as diffusers' scripts report it.
        samples_per_second: speed over all processes.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    samples_per_second: float


@dataclass
class Watch:
    """How a run is watched and saved, which does not affect the weights.

    Attributes:
        checkpoint_every: steps between checkpoints, 0 for one at the end only.
        keep: number of newest checkpoints to keep, 0 for all.
        on_step: called by the main process after each step.
        preview: called by the main process with the steps done and the model, in eval mode with the
            teacher's weights, every ``preview_every`` steps.
        preview_every: steps between previews, 0 for none.
    """

    checkpoint_every: int = 0
    keep: int = 2
    on_step: Callable[[Progress], None] = lambda progress: None
    preview: Callable[[int, nn.Module], None] = lambda step, model: None
    preview_every: int = 0


def train(
    subject: Subject,
    schedule: Schedule,
    samples: Samples,
    config: TrainConfig,
    run: RunDirectory,
    accelerator: Accelerator,
    watch: Watch,
    conditions: Conditions | None = None,
) -> Adapter | None:
    """Train a network in place. It ends in eval mode with the teacher's weights.

    Training continues from the run directory's latest checkpoint if it has one. On one CPU process
    the final weights are the same, bit for bit, whether or not the run was interrupted.

    Args:
        subject: the denoiser, without a schedule, in float32; its scheduler defines the forward
            process and the noise axis.
        schedule: the depth at each noise level.
        run: the run's open directory.
        accelerator: from :func:`make_accelerator`.
        conditions: the conditions of the samples. Default: their labels.

    Returns:
        With a ``lora_rank``, the trained adapter, which the model's weights already contain.

    Raises:
        AccelkitError: the loss or its gradient is not finite (the last checkpoint stays valid), the
            batch cannot be shared evenly, the data do not fit the model, the accelerator would
            change the steps, or another process ended.
        Stopped: SIGTERM or SIGINT came, and a checkpoint was written.
    """
    launch.check(accelerator)
    parts = accelerator.num_processes * config.gradient_accumulation
    if config.batch_size % parts:
        raise AccelkitError(
            f"a batch of {config.batch_size} cannot be shared by {accelerator.num_processes} "
            f"processes in {config.gradient_accumulation} parts each; "
            f"give a multiple of {parts}"
        )
    model, backbone, scheduler = subject.model, subject.backbone, subject.scheduler
    if conditions is None:
        if subject.calls.text:
            raise AccelkitError(f"a {type(model).__name__} is prompted by text; give its captions")
        conditions = Labels(samples.labels, backbone)
    process = process_for(scheduler, config, accelerator.device)
    supervision = supervision_for(config, backbone, schedule, scheduler, process)
    model.to(accelerator.device)
    with ExitStack() as stack:
        stack.enter_context(explain_lost_process(accelerator.num_processes))
        model.zero_grad()  # a backward pass before this one may have left something
        stack.callback(model.zero_grad)
        stack.enter_context(backbone.training(freeze_time=config.freeze_time_embedder))
        adapters = None
        if config.lora_rank:
            adapters = stack.enter_context(lora.injected(backbone, config.lora_rank, config.seed))
            checkpoints.keep_only_trained(model, accelerator, stack)
        parameters = [p for p in model.parameters() if p.requires_grad]
        apart = supervision is not None and config.intermediate_head == "own"
        heads = OwnHeads(backbone, schedule.depths[:-1] if apart else ())
        trained = [*parameters, *heads.parameters()]
        optimizer = torch.optim.AdamW(
            trained, config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        rates = get_scheduler(
            "cosine" if config.lr_schedule == "cosine" else "constant_with_warmup",
            optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.steps,
        )
        ema = EMAModel(parameters, decay=config.ema_decay, foreach=True)
        enabled = stack.enter_context(enable(subject, schedule))
        supervised = None
        if supervision is not None:
            supervised = (stack.enter_context(Taps(enabled, heads.used)), supervision)
        if config.gradient_checkpointing:
            model.enable_gradient_checkpointing()
            stack.callback(model.disable_gradient_checkpointing)
        stack.callback(accelerator.free_memory)
        stack.callback(_unprepare, model, model.__dict__.get("forward"))
        accelerator.sync_gradients = True  # a global that another loop may have cleared
        wrapped, optimizer = accelerator.prepare(model, optimizer)
        step = Step(
            wrapped,
            trained,
            subject.calls,
            process,
            subject.axis,
            samples,
            conditions,
            config,
            run,
            accelerator,
            heads,
            supervised,
        )
        own = {"ema": ema, "rates": rates} | ({"heads": heads} if apart else {})
        done = checkpoints.restore(run, accelerator, adapters is not None, own)
        ema.to(accelerator.device)  # restored on the CPU
        stop = stack.enter_context(_signals())

        model.train()
        while done < config.steps:
            began = time.perf_counter()
            loss, norm = step.gradients(done, bool(stop))
            optimizer.step()
            optimizer.zero_grad()
            rates.step()
            ema.step(parameters)
            done += 1
            if accelerator.is_main_process:
                rate = config.batch_size / (time.perf_counter() - began)
                lr = rates.get_last_lr()[0]
                watch.on_step(Progress(done, loss, norm, float(lr), rate))
            due = watch.checkpoint_every and done % watch.checkpoint_every == 0
            if due or step.stopping or done == config.steps:
                checkpoints.save(run, done, watch.keep, accelerator, own)
            if step.stopping and done < config.steps:
                raise Stopped(stop[0] if stop else signal.SIGTERM, done)
            if watch.preview_every and done % watch.preview_every == 0:
                if accelerator.is_main_process:
                    with _teacher(ema, parameters, model):
                        watch.preview(done, model)
                accelerator.wait_for_everyone()
        ema.copy_to(parameters)
        adapter = None if adapters is None else adapters.adapter()
    if adapter is not None:
        adapter.apply(model)
    model.eval()
    return adapter


def process_for(
    scheduler: Any, config: TrainConfig, device: torch.device | str = "cpu"
) -> ForwardProcess:
    """Return the forward process of a run; AccelkitError if the scheduler has none to train on."""
    density = Density(config.timestep_density, config.logit_mean, config.logit_std)
    return forward_process(scheduler, device, density)


def _unprepare(model: nn.Module, forward: Any) -> None:
    """Remove what accelerate puts on a model: its precision wrapper and its mark."""
    for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
        model.__dict__.pop(name, None)
    if forward is not None:
        model.forward = forward


@contextmanager
def _teacher(ema: EMAModel, parameters: list[nn.Parameter], model: nn.Module) -> Iterator[None]:
    """Give the student the teacher's weights while entered."""
    ema.store(parameters)
    ema.copy_to(parameters)
    model.eval()
    try:
        yield
    finally:
        ema.restore(parameters)
        model.train()


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT while entered, in the main thread; others cannot catch signals."""
    caught: list[int] = []
    previous = {}
    for signum in (signal.SIGTERM, signal.SIGINT):
        try:
            previous[signum] = signal.signal(signum, lambda number, frame: caught.append(number))
        except ValueError:  # not in the main thread
            break
    try:
        yield caught
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
