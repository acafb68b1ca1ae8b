"""The settings of a training run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from accelkit.errors import AccelkitError

LR_SCHEDULES = ("constant", "cosine")
LOSS_WEIGHTS = ("ones", "ramp")
DENSITIES = ("uniform", "logit-normal")
MATCHES = ("nearest", "relative", "middle", "random")
HEADS = ("shared", "own")
PRECISIONS = ("no", "bf16", "fp16")
_KINDS: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "float": (int, float),
    "int": (int,),
    "str": (str,),
}
_WORDS = {"bool": "true or false", "float": "a number", "int": "a whole number", "str": "text"}


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides what weights a run ends with, and how it is watched.

    Attributes:
        steps: updates of the weights. One whose gradients overflow a loss scaler is run again.
        batch_size: samples per step over all processes and accumulated parts.
        learning_rate: peak rate of AdamW.
        lr_schedule: ``constant`` or ``cosine`` (to 0), after ``lr_warmup_steps``.
        weight_decay: of AdamW.
        max_grad_norm: gradients are clipped to this norm.
        ema_decay: of the teacher. At step n = 2, 3, ... the decay is n / (n + 9), but at most this;
            at step 1 it is 0, so that the teacher begins as the student after its first step.
        label_dropout: share of samples trained without their label, for guidance.
        loss_weight: lambda(t) of Moon et al. 2024, algorithm 1, whose form the paper leaves open:
            ``ones`` as in its authors' code; ``ramp`` grows from 0.1 at the data to 1 at noise.
        loss_weight_until: share of the run after which the weight is 1 everywhere (cycle C).
        timestep_density: how positions on the straight path of a flow-matching model are drawn,
            before its scheduler's shift: ``uniform``, or ``logit-normal`` as SD3's (Esser et al.
            2024, section 3.1). Other models' timesteps are uniform.
        logit_mean, logit_std: of the logit-normal density; a mean above 0 favours noise.
        intermediate_weight: of the losses at the exits that a sample passes by, beside the one at
            its own (depth-varying diffusion, :mod:`accelkit.train.dvd`); 0 trains without them.
        intermediate_match: which timestep of an exit's own noise levels its target is taken from:
            ``nearest`` to the sample's, ``relative`` position, ``middle`` or ``random``.
        intermediate_head: what makes a prediction of the hidden states at such an exit: the
            network's head, ``shared`` by all, or the exit's ``own``, which only the training has
            (:mod:`accelkit.train.dvd`).
        lora_rank: train low-rank adapters of this rank (Hu et al. 2022) beside the blocks' linear
            layers, and nothing else; 0 trains all weights.
        freeze_time_embedder: keep it out of the optimiser, as the authors' command does.
        gradient_accumulation: parts that a step's batch is run in, whatever accelerate is told.
        gradient_checkpointing: recompute blocks in the backward pass to save memory.
        mixed_precision: ``no``, ``bf16`` or ``fp16``, the last one not on a CPU.
        seed: of everything drawn. A step's draws depend on the seed and the step alone, neither on
            the number of processes nor on whether the run was resumed. A network's own dropout
            depends on the process as well, as each draws for its share of the batch.
    """

    steps: int = 200
    batch_size: int = 64
    learning_rate: float = 2e-5
    lr_schedule: str = "constant"
    lr_warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    ema_decay: float = 0.9999
    label_dropout: float = 0.1
    loss_weight: str = "ones"
    loss_weight_until: float = 1 / 3
    timestep_density: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    intermediate_weight: float = 0.0
    intermediate_match: str = "nearest"
    intermediate_head: str = "shared"
    lora_rank: int = 0
    freeze_time_embedder: bool = True
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    mixed_precision: str = "no"
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, kinds = getattr(self, field.name), _KINDS[str(field.type)]
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                self._require(field.name, False, _WORDS[str(field.type)])
        for name in ("steps", "batch_size", "gradient_accumulation"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("learning_rate", "max_grad_norm"):
            self._require(name, 0 < getattr(self, name) < math.inf, "above 0")
        self._require("lora_rank", self.lora_rank >= 0, "0 or more")
        self._require("logit_mean", math.isfinite(self.logit_mean), "finite")
        self._require("logit_std", 0 < self.logit_std < math.inf, "above 0")
        self._require("seed", 0 <= self.seed < 2**32, "in [0, 2^32)")
        for name in ("lr_warmup_steps", "weight_decay", "intermediate_weight"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "0 or more")
        self._require("ema_decay", 0 <= self.ema_decay < 1, "in [0, 1)")
        for name in ("label_dropout", "loss_weight_until"):
            self._require(name, 0 <= getattr(self, name) <= 1, "in [0, 1]")
        for name, known in (
            ("lr_schedule", LR_SCHEDULES),
            ("loss_weight", LOSS_WEIGHTS),
            ("timestep_density", DENSITIES),
            ("intermediate_match", MATCHES),
            ("intermediate_head", HEADS),
            ("mixed_precision", PRECISIONS),
        ):
            self._require(name, getattr(self, name) in known, f"one of {', '.join(known)}")

    def _require(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise AccelkitError(f"{name} must be {wanted}, got {getattr(self, name)!r}")

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TrainConfig:
        """Build from a dictionary; unknown names raise AccelkitError."""
        unknown = set(data) - {f.name for f in fields(cls)}
        if unknown:
            raise AccelkitError(f"unknown training settings: {', '.join(sorted(unknown))}")
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain data."""
        return asdict(self)

    def weight_at(self, step: int, level: Any) -> Any:
        """Return lambda at 0-based ``step`` for noise levels (a tensor) in [0, 1]."""
        if self.loss_weight == "ones" or step >= self.loss_weight_until * self.steps:
            return level * 0 + 1
        return 0.1 + 0.9 * level
