"""Bandwidth of each kernel, against a copy of the same bytes and the compiled reference.

Needs a GPU. Sizes are those of DiT-XL/2 at 256 pixels: 256 tokens a sample, 1152 features. The
kernel, torch.compile of its reference and a copy of as many bytes as the operation must move take
turns; figures are medians. `skip_linear` is bound by arithmetic and listed only for comparison.
"""

import statistics
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import accelkit_kernels as ak
from benchmarks.common import parser, ratio, record

TOKENS, WIDTH, HIDDEN, HEADS, SIDE = 256, 1152, 4608, 16, 16  # DiT-XL/2, and 16 x 16 patches
SCRATCH = 2**30  # bytes


class Case(NamedTuple):
    """An operation, its inputs, and the bytes that it must move.

    Attributes:
        operation: the public function, which runs the kernel.
        reference: the same in plain PyTorch.
        inputs: arguments of both. The bytes do not count the vectors among them.
        forward: bytes of the forward pass.
        backward: bytes of the backward pass, 0 if it has no kernel.
        leaves: number of inputs, counted from the first, that have a gradient.
    """

    operation: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: tuple[Any, ...]
    forward: int
    backward: int = 0
    leaves: int = 0


def cases(batch: int, dtype: torch.dtype, device: str) -> dict[str, Case]:
    def normal(*size: int) -> Tensor:
        return torch.randn(size, device=device, dtype=dtype)

    x, y, skip = (normal(batch, TOKENS, WIDTH) for _ in range(3))
    gate, shift, scale = normal(batch, 6 * WIDTH).chunk(6, dim=1)[:3]
    wide, value = normal(batch, TOKENS, HIDDEN), normal(batch, TOKENS, HIDDEN)
    bias, value_bias = normal(2, HIDDEN)
    level = torch.rand(batch, device=device)
    qkv = normal(batch, TOKENS, 3, HEADS, WIDTH // HEADS)
    cos, sin = ak.rotary_2d(SIDE, SIDE, WIDTH // HEADS, device=device)
    last, joining = normal(2 * 2 * 8, WIDTH), normal(WIDTH, 2 * WIDTH)
    image = batch * 4 * (2 * SIDE) ** 2 * x.element_size()

    def head(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *tensors: function(*tensors, (SIDE, SIDE), 2, 4)

    t, w = x.nbytes, wide.nbytes
    gates = (wide, value, bias, value_bias)
    return {
        "layernorm_modulate": Case(
            ak.layernorm_modulate, ak.layernorm_modulate_reference,
            (x, shift, scale), 2 * t,
        ),
        "gated_residual": Case(
            ak.gated_residual, ak.gated_residual_reference, (x, y, gate), 3 * t
        ),
        "gated_residual_layernorm_modulate": Case(
            ak.gated_residual_layernorm_modulate, ak.gated_residual_layernorm_modulate_reference,
            (x, y, gate, shift, scale), 4 * t,
        ),
        "bias_gelu_tanh": Case(
            ak.bias_gelu_tanh, ak.bias_gelu_tanh_reference, (wide, bias), 2 * w, 3 * w, 2
        ),
        "bias_geglu": Case(ak.bias_geglu, ak.bias_geglu_reference, gates, 3 * w, 5 * w, 4),
        "bias_swiglu": Case(ak.bias_swiglu, ak.bias_swiglu_reference, gates, 3 * w, 5 * w, 4),
        "td_norm": Case(
            ak.td_norm, ak.td_norm_reference,
            (x, level, normal(4, WIDTH), normal(4, WIDTH)), 2 * t, 3 * t, 4,
        ),
        "qk_norm_rope": Case(
            ak.qk_norm_rope, ak.qk_norm_rope_reference,
            (qkv[:, :, 0], qkv[:, :, 1], cos, sin), 4 * t, 6 * t, 2,
        ),
        "exit_head": Case(
            head(ak.exit_head), head(ak.exit_head_reference),
            (x, shift, scale, last, normal(len(last))), t + image,
        ),
        "skip_linear": Case(
            ak.skip_linear, ak.skip_linear_reference,
            (x, skip, joining, normal(WIDTH)), 3 * t + joining.nbytes,
        ),
    }  # fmt: skip


def training(function: Callable[..., Any], case: Case) -> Callable[[], object]:
    """Return a forward and backward pass of a case."""
    leaves = [t.detach().requires_grad_() for t in case.inputs[: case.leaves]]
    rest = case.inputs[case.leaves :]
    with torch.no_grad():
        made = case.reference(*leaves, *rest)
    grads = [torch.randn_like(t) for t in (made if isinstance(made, tuple) else (made,))]

    def run() -> object:
        out = function(*leaves, *rest)
        return torch.autograd.grad(out, leaves, grads)

    return run


def interleaved(
    work: dict[str, Callable[[], object]], rounds: int, scratch: Tensor
) -> dict[str, list[float]]:
    """Return the GPU's seconds of each piece of work, taking turns after a round of warm-up."""
    for run in work.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, run in work.items():
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in "12")
            # This empties the L2 cache, and takes longer than Python needs to queue the call.
            scratch.zero_()
            began.record()
            run()
            ended.record()
            ended.synchronize()
            seconds[name].append(began.elapsed_time(ended) / 1e3)
    return seconds


def measured(
    kernel: Callable[[], object],
    compiled: Callable[[], object],
    moved: int,
    rounds: int,
    scratch: Tensor,
) -> dict[str, Any]:
    source = torch.empty(moved // 2, dtype=torch.uint8, device=scratch.device)
    copy = torch.empty_like(source)
    work = {"kernel": kernel, "compiled": compiled, "copy": lambda: copy.copy_(source)}
    seconds = interleaved(work, rounds, scratch)
    return {
        "bytes": moved,
        "gigabytes_per_second": {
            name: moved / statistics.median(taken) / 1e9 for name, taken in seconds.items()
        },
        "bandwidth_of_copy": ratio(seconds, "copy", "kernel"),
        "speed_of_compiled": ratio(seconds, "compiled", "kernel"),
    }


def main() -> None:
    options = parser(__doc__, rounds=50)
    options.add_argument("--batch", type=int, default=128)
    options.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    given = options.parse_args()
    if not torch.cuda.is_available():
        options.exit(2, "benchmarks.kernels needs a CUDA device, and none was found\n")
    # If a reference ran in place of its kernel, its time would pass for the kernel's.
    warnings.filterwarnings("error", message="accelkit_kernels")
    torch.manual_seed(0)
    scratch = torch.empty(SCRATCH, dtype=torch.uint8, device="cuda")
    results = {}
    for name, case in cases(given.batch, getattr(torch, given.dtype), "cuda").items():
        compiled = torch.compile(case.reference, dynamic=False)
        with torch.no_grad():
            results[name] = measured(
                lambda case=case: case.operation(*case.inputs),
                lambda case=case, compiled=compiled: compiled(*case.inputs),
                case.forward, given.rounds, scratch,
            )  # fmt: skip
        if case.backward:
            results[f"{name}, forward and backward"] = measured(
                training(case.operation, case), training(compiled, case),
                case.forward + case.backward, given.rounds, scratch,
            )  # fmt: skip
    protocol = {
        "batch": given.batch,
        "dtype": given.dtype,
        "bandwidth_of_copy": "seconds of a copy moving the same bytes / of the kernel",
        "speed_of_compiled": "seconds of torch.compile of the reference / of the kernel",
    }
    record("benchmarks.kernels", protocol, results, given.output)


if __name__ == "__main__":
    main()
