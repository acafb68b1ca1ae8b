"""The settings of a training run, and of the autoencoder before it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from accelkit.errors import AccelkitError
from accelkit.fields import (
    COUNT,
    ESSENTIAL,
    FINITE,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    SHARE,
    SHARE_BELOW_1,
    TRAINING,
    Rule,
    check,
    one_of,
    setting,
    size,
)
from accelkit.models.sizes import MOST, MOST_LAYERS


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides which weights a run ends with.

    A step whose gradients overflow a loss scaler is run again. At step n = 2, 3, ... the decay of
    the EMA teacher is n / (n + 9), but at most ``ema_decay``; at step 1 it is 0, so that the
    teacher begins as the student after its first step.

    ``loss_weight`` is lambda(t) of Moon et al. 2024, algorithm 1, whose form the paper leaves open:
    1 as in its authors' code, or a ramp. ``timestep_density`` is the density of positions on the
    straight path of a flow-matching model, before its scheduler's shift (Esser et al. 2024, section
    3.1); other models' timesteps are uniform. ``intermediate_weight`` and the two after it belong
    to depth-varying diffusion (:mod:`accelkit.train.dvd`), ``lora_rank`` to Hu et al. 2022.

    A step's draws depend on ``seed`` and the step alone, neither on the number of processes nor on
    whether the run was resumed. A network's own dropout depends on the process as well, as each
    process draws for its share of the batch.

    Raises:
        AccelkitError: a setting of the wrong type or out of range.
    """

    steps: int = setting(200, "Optimiser steps", ESSENTIAL, rule=COUNT)
    batch_size: int = setting(
        64, "Samples per step, over all processes and accumulated parts", TRAINING, rule=COUNT
    )
    learning_rate: float = setting(2e-5, "Peak learning rate of AdamW", TRAINING, rule=POSITIVE)
    lr_schedule: str = setting(
        "constant",
        "Learning rate after the warm-up: constant, or cosine (to 0)",
        TRAINING,
        rule=one_of("constant", "cosine"),
    )
    lr_warmup_steps: int = setting(
        0, "Steps in which the learning rate rises from 0", TRAINING, rule=NOT_NEGATIVE
    )
    weight_decay: float = setting(0.0, "AdamW weight decay", TRAINING, rule=NOT_NEGATIVE)
    max_grad_norm: float = setting(
        1.0, "Norm to which gradients are clipped", TRAINING, rule=POSITIVE
    )
    ema_decay: float = setting(0.9999, "Decay of the EMA teacher", TRAINING, rule=SHARE_BELOW_1)
    label_dropout: float = setting(
        0.1, "Share of samples trained without their label, for guidance", TRAINING, rule=SHARE
    )
    loss_weight: str = setting(
        "ones",
        "Weight of the loss by noise level: ones, or ramp (0.1 at the data to 1 at noise)",
        rule=one_of("ones", "ramp"),
    )
    loss_weight_until: float = setting(
        1 / 3, "Share of the run after which the weight of the loss is 1 everywhere", rule=SHARE
    )
    timestep_density: str = setting(
        "uniform",
        "Density of a flow-matching model's timesteps: uniform, or logit-normal (SD3)",
        rule=one_of("uniform", "logit-normal"),
    )
    logit_mean: float = setting(
        0.0, "Mean of logit-normal timesteps; above 0 for more noise", rule=FINITE
    )
    logit_std: float = setting(1.0, "Deviation of logit-normal timesteps", rule=POSITIVE)
    intermediate_weight: float = setting(
        0.0,
        "Weight of the losses at intermediate exits, before a sample's own; dvd schedules set 1",
        rule=NOT_NEGATIVE,
    )
    intermediate_match: str = setting(
        "nearest",
        "Noise level of the target at an intermediate exit, among the exit's own levels: nearest "
        "(to the sample's), relative, middle or random",
        rule=one_of("nearest", "relative", "middle", "random"),
    )
    intermediate_head: str = setting(
        "shared",
        "Output head at an intermediate exit: shared (the network's), or own (dropped after the "
        "training)",
        rule=one_of("shared", "own"),
    )
    lora_rank: int = setting(
        0,
        "Rank of low-rank adapters to train instead of all weights; 0 for none",
        TRAINING,
        rule=NOT_NEGATIVE,
    )
    freeze_time_embedder: bool = setting(
        True, "Timestep embedder left out of the training, as in the ASE authors' command"
    )
    gradient_accumulation: int = setting(
        1, "Parts in which a step's batch is run, to save memory", TRAINING, rule=COUNT
    )
    gradient_checkpointing: bool = setting(
        False, "Blocks recomputed in the backward pass, to save memory", TRAINING
    )
    mixed_precision: str = setting(
        "no",
        "Mixed precision: no, bf16, or fp16 (on a GPU)",
        TRAINING,
        rule=one_of("no", "bf16", "fp16"),
        envvar="ACCELERATE_MIXED_PRECISION",
    )
    seed: int = setting(0, "Seed of everything drawn in training", TRAINING, rule=SEED)

    def __post_init__(self) -> None:
        check(self)

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


GROUPS = 8
"""Groups of the autoencoder's normalisations, which share the channels evenly."""
_LEVELS = 16


def _are_channels(value: Any) -> bool:
    if not isinstance(value, tuple) or not 0 < len(value) <= _LEVELS:
        return False
    return all(type(c) is int and 0 < c <= MOST and c % GROUPS == 0 for c in value)


@dataclass(frozen=True)
class AutoencoderConfig:
    """How the autoencoder of a model trained from scratch is built and trained.

    ``kl_weight`` is small because the latents are normalised by their measured deviation afterwards
    (Rombach et al. 2022, section G).

    Raises:
        AccelkitError: a setting of the wrong type or out of range.
    """

    channels: tuple[int, ...] = setting(
        (16, 32, 32),
        "Channels of each resolution",
        rule=Rule(
            f"a list of multiples of {GROUPS}, at most {_LEVELS} of them, each up to {MOST:,}",
            _are_channels,
        ),
    )
    layers_per_block: int = setting(1, "Residual blocks per resolution", rule=size(MOST_LAYERS - 1))
    latent_channels: int = setting(4, "Channels of the latents", rule=size(MOST))
    steps: int = setting(2000, "Optimiser steps", rule=size(MOST))
    batch_size: int = setting(64, "Images per step", rule=size(MOST))
    learning_rate: float = setting(2e-3, "Peak learning rate of AdamW", rule=POSITIVE)
    kl_weight: float = setting(
        1e-4, "Weight of the KL divergence per latent element", rule=NOT_NEGATIVE
    )
    seed: int = setting(0, "Seed of weights and batches", rule=SEED)

    def __post_init__(self) -> None:
        check(self, "; see [autoencoder]")
