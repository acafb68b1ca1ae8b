"""One step: the clipped gradients of a whole batch, however it is shared, split or scaled."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

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
from accelkit.train.dvd import Supervision
from accelkit.train.heads import OwnHeads
from accelkit.train.objectives import denoising_loss
from accelkit.train.rundir import RunDirectory
from accelkit.train.samples import Conditions, Samples


@dataclass
class Step:
    """Computes the gradients of a step, which is a function of the seed and its number alone.

    Attributes:
        model: the network as the accelerator prepared it.
        trained: its parameters that are trained, and those of ``heads``.
        calls: how the network is called.
        process, axis: the forward process, and where its timesteps are on the noise axis.
        samples, conditions: the data.
        config, run, accelerator: of the run.
        heads: the heads of earlier exits, perhaps none.
        supervised: the exits that samples pass and the losses there, if any.
        stopping: whether a signal reached any of the processes by the latest step.
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
        """Leave the clipped gradients of a 0-based step on its parameters, which have none yet.

        A loss scaler drops gradients that overflow at its scale. The step is run again, with the
        same draws at the lower scale, until it can be taken: so every step that is counted updates
        the weights once, and a resumed run takes the same ones.

        Args:
            step: its number.
            signalled: whether this process is to stop.

        Returns:
            The loss over all processes, and the norm of its gradient before clipping.

        Raises:
            AccelkitError: the loss is not finite, or its gradient is not at any scale.
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
            scale = 1.0 if scaler is None else scaler.get_scale()
            if scaler is not None and scale > 1:  # at scale 1 a lower one would not help
                scaler.update()
            # it stays as it is where only the norm overflows, and no gradient
            if scaler is None or scaler.get_scale() >= scale:
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
        self.stopping = signals > 0  # on any process: all of them stop at the same step
        return loss

    @contextmanager
    def _own_randomness(self, step: int) -> Iterator[None]:
        """Let what the network itself draws, such as dropout, follow from the step as well."""
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
            on_the_way = supervision.losses(passed, x0, eps, t, share.place.to(device))
            losses = losses + self.config.intermediate_weight * on_the_way
        return (weight.float() * losses).mean()

    def _diverged(self, what: str, value: float, step: int) -> str:
        latest = self.run.latest()
        kept = (
            f"the checkpoint of step {latest[0]} is kept" if latest else "no checkpoint was reached"
        )
        return (
            f"the {what} is {value} at step {step + 1}; {kept}. Lower --learning-rate, "
            "or train with --mixed-precision no"
        )
