"""One training step: the clipped gradients of a batch, shared, split or scaled in any way."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from accelkit.backbones.conditioning import Conditioning
from accelkit.errors import AccelkitError
from accelkit.noise.axis import NoiseAxis
from accelkit.noise.processes import ForwardProcess
from accelkit.runtime.taps import Taps
from accelkit.train.config import TrainConfig
from accelkit.train.draws import Draw, draw, seed_of_model
from accelkit.train.dvd import OwnHeads, Supervision
from accelkit.train.objectives import denoising_loss
from accelkit.train.rundir import RunDirectory
from accelkit.train.samples import Conditions, Samples


@dataclass
class Step:
    """Computes the gradients of a step, a function of the seed and the step's number alone.

    Attributes:
        model: the network as prepared by the accelerator.
        trained: parameters that are trained, of the network and of ``heads``.
        calls: conditioning of the network's calls.
        process: the forward process.
        axis: the noise axis of the process.
        samples, conditions: the data.
        config, run, accelerator: settings, directory and accelerator of the run.
        heads: the heads of earlier exits, possibly none.
        supervised: the taps at earlier exits and their losses, if any.
        stopping: whether a signal had reached any process by the latest step.
    """

    model: nn.Module
    trained: Sequence[nn.Parameter]
    calls: Conditioning
    process: ForwardProcess
    axis: NoiseAxis
    samples: Samples
    conditions: Conditions
    config: TrainConfig
    run: RunDirectory
    accelerator: Accelerator
    heads: OwnHeads
    supervised: tuple[Taps, Supervision] | None
    stopping: bool = False

    def gradients(self, step: int, signalled: bool) -> tuple[float, float]:
        """Compute the clipped gradients of a 0-based step; parameters must have none yet.

        A loss scaler drops gradients that overflow at its scale. The step is then run again, with
        the same draws at the lower scale, until it succeeds. So every counted step updates the
        weights once, and a resumed run takes the same steps.

        Args:
            step: number of the step.
            signalled: whether this process received a signal to stop.

        Returns:
            The loss over all processes, and the norm of its gradient before clipping.

        Raises:
            AccelkitError: the loss is not finite, or its gradient is not finite at any scale.
        """
        scaler = self.accelerator.scaler
        while True:
            loss = self._backward(step, signalled)
            if not math.isfinite(loss):
                raise AccelkitError(self._diverged("loss", loss, step))
            self.heads.synchronize(self.accelerator)
            limit = self.config.max_grad_norm
            norm = float(self.accelerator.clip_grad_norm_(self.trained, limit))
            if math.isfinite(norm):
                return loss, norm
            if not _lowered(scaler):
                raise AccelkitError(self._diverged("gradient norm", norm, step))
            for parameter in self.trained:
                parameter.grad = None

    def _backward(self, step: int, signalled: bool) -> float:
        """Accumulate the gradients of a step; return its loss over all processes."""
        config, accelerator = self.config, self.accelerator
        whole = draw(
            config.seed,
            step,
            config.batch_size,
            size=len(self.samples),
            shape=self.samples.shape,
            timesteps=self.process.draw,
            dropout=config.label_dropout,
        )
        count = config.gradient_accumulation
        mine = whole.part(accelerator.process_index, accelerator.num_processes)
        total = torch.zeros((), device=accelerator.device)
        with self._own_randomness(step):
            for index in range(count):
                last = index == count - 1
                with nullcontext() if last else accelerator.no_sync(self.model):
                    loss = self._loss(step, mine.part(index, count)) / count
                    accelerator.backward(loss)
                total += loss.detach()
        report = torch.stack([total.float(), torch.full_like(total, signalled)])
        loss, signals = accelerator.reduce(report, "mean").tolist()
        self.stopping = signals > 0  # a signal to one process stops all of them at the same step
        return loss

    @contextmanager
    def _own_randomness(self, step: int) -> Iterator[None]:
        """Make the network's own draws, such as dropout, a function of the step as well."""
        device = self.accelerator.device
        with torch.random.fork_rng([] if device.type == "cpu" else [device]):
            torch.manual_seed(seed_of_model(self.config.seed, step, self.accelerator.process_index))
            yield

    def _loss(self, step: int, share: Draw) -> Tensor:
        device = self.accelerator.device
        x0 = self.samples.sample(share.rows, share.posterior).to(device)
        eps, t = share.noise.to(device), share.timestep.to(device)
        xt = self.process.add_noise(x0, eps, t)
        rows = self.conditions.rows(share.rows, share.drop)
        output = self.model(**self.calls.arguments(xt, t, rows), return_dict=False)[0]
        output = self.calls.prediction(output, xt)
        level = torch.tensor(self.axis.levels(share.timestep))
        weight = self.config.weight_at(step, level).to(device)
        losses = denoising_loss(self.process, output, x0, eps, xt, t)
        if self.supervised is not None:
            taps, supervision = self.supervised
            passed = [
                replace(tap, output=self.calls.prediction(tap.output, xt[tap.rows]))
                for tap in taps.pop()
            ]
            intermediate = supervision.losses(passed, x0, eps, t, share.place.to(device))
            losses = losses + self.config.intermediate_weight * intermediate
        return (weight.float() * losses).mean()

    def _diverged(self, what: str, value: float, step: int) -> str:
        latest = self.run.latest()
        kept = (
            f"the checkpoint of step {latest[0]} is kept" if latest else "no checkpoint was written"
        )
        return (
            f"the {what} is {value} at step {step + 1}; {kept}. Lower --learning-rate, "
            "or train with --mixed-precision no"
        )


def _lowered(scaler: Any) -> bool:
    """Lower the scale of a loss scaler; return False at scale 1, or if no gradient overflows."""
    if scaler is None or (scale := scaler.get_scale()) <= 1:
        return False
    scaler.update()
    return bool(scaler.get_scale() < scale)
