"""The launchers that a run works with: those where every process holds all weights.

``accelerate launch`` and ``accelerate config`` pass their settings on in environment variables,
which reach every Accelerator. Training computes a step itself: it shares and accumulates the batch,
clips the gradients, steps the rate and the teacher. A setting that would do one of these a second
time, or split the weights, is refused by name.
"""

from __future__ import annotations

import os
from typing import Any

from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, GradientAccumulationPlugin

from accelkit.errors import AccelkitError
from accelkit.train.config import TrainConfig

_SHARDED = "in training every process holds all weights and averages the gradients"
_REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": ("DeepSpeed", "--use_deepspeed", _SHARDED),
    "ACCELERATE_USE_FSDP": ("FSDP", "--use_fsdp", _SHARDED),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", "--use_megatron_lm", _SHARDED),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (
        "tensor and context parallelism",
        "--use_parallelism_config",
        _SHARDED,
    ),
    # accelerate converts the linear layers by this variable alone, whatever the precision is.
    "ACCELERATE_FP8_BACKEND": (
        "FP8",
        "--mixed_precision fp8",
        "training supports no, bf16 and fp16",
    ),
    # torch.compile would compile again for every mixture of depths, and accelerate turns on TF32.
    "ACCELERATE_DYNAMO_BACKEND": (
        "torch.compile",
        "--dynamo_backend",
        "the depth of training changes from step to step",
    ),
}
_REPLICATED = {"NO", *(kind.value for kind in DistributedType if kind.value.startswith("MULTI_"))}


def make_accelerator(config: TrainConfig, **options: Any) -> Accelerator:
    """Return the Accelerator of a run.

    A batch share without a single full-depth sample leaves the deepest blocks without a gradient,
    so the distributed reducer has to look for unused parameters. A batch is run in
    ``config.gradient_accumulation`` parts, whatever ACCELERATE_GRADIENT_ACCUMULATION_STEPS is; only
    a plugin overrides that variable.

    Raises:
        AccelkitError: the environment requests something that training does not support, or
            accelerate cannot set the run up.
    """
    for name, (what, flag, why) in _REFUSED.items():
        value = os.environ.get(name, "")
        if value.lower() not in ("", "0", "n", "f", "no", "off", "false"):
            raise AccelkitError(
                f"{name}={value} requests {what}, but {why}; launch without {flag}, or unset {name}"
            )
    try:
        return Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
            **options,
        )
    except (ValueError, RuntimeError) as error:
        why = " ".join(str(error).split())[:200]
        raise AccelkitError(f"accelerate cannot set up the run: {why}") from error


def check(accelerator: Accelerator) -> None:
    """Raise AccelkitError if an Accelerator would change how a step is computed.

    This includes Accelerators from :func:`make_accelerator`, since accelerate keeps the settings of
    a process's first one.
    """
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind not in _REPLICATED or accelerator.state.dynamo_plugin.backend.value != "NO":
        raise AccelkitError(
            f"the Accelerator was made for {kind} and dynamo backend "
            f"{accelerator.state.dynamo_plugin.backend.value}, but {_SHARDED}; in a new process, "
            "take the one that accelkit.train.loop.make_accelerator returns"
        )
    if (steps := accelerator.gradient_accumulation_steps) != 1:
        raise AccelkitError(
            f"the Accelerator divides every gradient by its gradient_accumulation_steps, {steps}; "
            "make it with 1 and set TrainConfig.gradient_accumulation"
        )
    if accelerator.mixed_precision == "fp16" and accelerator.scaler is None:
        raise AccelkitError(
            f"there is no training in fp16 on {accelerator.device.type}; train with "
            "--mixed-precision bf16 or no"
        )
