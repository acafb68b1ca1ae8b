"""Cases, gradients, tolerances, interpretation and compilation, shared by the kernels' tests.

Triton decides at its import whether kernels are interpreted. So a test file also runs as a script
under the interpreter, by `main`. Compilation for GPUs that this machine lacks needs no process of
its own.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from accelkit_kernels import _common

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = ["contiguous", "strided"]
TARGETS = [80, 86, 90, 100]
# Kernels are compiled in bfloat16 for all targets, and in float32, whose tiles take no more
# registers, for the target on which kernels have spilled first.
BUILDS = [*(("bf16", target) for target in TARGETS), ("fp32", 86)]
# For kernels whose registers hold float32 whatever the dtype: one target shows how they load it.
COMPILED = [*(("bf16", target) for target in TARGETS), ("fp32", 80)]

needs_triton = pytest.mark.skipif(not _common.HAS_TRITON, reason="Triton is not installed")
needs_compiler = pytest.mark.skipif(
    not _common.HAS_TRITON or _common.INTERPRETED, reason="Triton is missing, or interprets"
)


def on_cuda(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that runs a kernel on a GPU; it fails if the reference runs instead."""
    test = pytest.mark.filterwarnings("error::RuntimeWarning")(test)
    test = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test)
    return pytest.mark.gpu(test)


def outputs(
    function: Callable[..., Any], leaves: Sequence[Tensor], grads: Sequence[Tensor]
) -> list[Tensor]:
    """Return the outputs of `function`, then the gradients of the leaves."""
    leaves = [t.detach().requires_grad_() for t in leaves]
    out = function(*leaves)
    out = [out] if isinstance(out, Tensor) else list(out)
    return [*(t.detach() for t in out), *torch.autograd.grad(out, leaves, grads)]


def check(actual: Sequence[Tensor], expected: Sequence[Tensor], names: str) -> None:
    """Compare within 1e-5 in float32, and within the rounding of the last cast in the halves."""
    for name, a, e in zip(names.split(), actual, expected, strict=True):
        assert a.shape == e.shape, name
        assert a.is_contiguous(), name
        # A row of one feature normalises to zero, so that its dx is zero and sets no scale.
        atol = 1e-5 * max(1.0, float(e.abs().max()) if e.numel() else 0.0)
        rtol = max(1e-5, torch.finfo(a.dtype).eps)
        torch.testing.assert_close(
            a.double(), e.double(), rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def run_python(*args: str, interpret: bool) -> None:
    env = os.environ | {
        "TRITON_INTERPRET": str(int(interpret)),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    done = subprocess.run(
        [sys.executable, *args], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def interpreted(script: str, folder: Path) -> Any:
    """Return what the script's `interpret` returns under Triton's interpreter."""
    run_python(script, str(folder / "outputs.pt"), interpret=True)
    return torch.load(folder / "outputs.pt", weights_only=True)


def check_spills(usage: dict[str, dict[str, int]], count: int, record_property: Any) -> None:
    """Check that none of the compiled kernels, `count` in all, uses the stack.

    Triton uses the stack for spills only.
    """
    assert len(usage) == count
    for label, used in usage.items():
        record_property(label, used)
    spilled = {label: used for label, used in usage.items() if used["STACK"]}
    assert not spilled


def compile_kernel(
    kernel: Any,
    constants: dict[str, Any],
    dtype: str,
    target: int,
    warps: int,
    types: dict[str, Any],
    stages: int = 3,
) -> dict[str, int]:
    """Compile the kernel as launched for aligned tensors of `dtype`, but for those in `types`.

    A tuple in `types` stands for an argument that is a tuple of tensors. Returns the registers, and
    the bytes of stack, shared memory and code.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    dump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    types = {"partial_ptr": "*fp32", "eps": "fp32"} | types | dict.fromkeys(constants, "constexpr")
    signature = {
        name: types.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }
    aligned = {}
    for i, name in enumerate(kernel.arg_names):
        if isinstance(signature[name], tuple):
            aligned |= {(i, j): [["tt.divisibility", 16]] for j in range(len(signature[name]))}
        elif name not in constants and (name == "D" or name.endswith(("_ptr", "_b", "_n", "_o"))):
            aligned[i,] = [["tt.divisibility", 16]]
    built = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", target, 32),
        options={"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True},
    )
    binary = built.asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage = subprocess.check_output([dump, "-res-usage", file.name], text=True)
    words = (word.partition(":") for word in usage.split())
    found = {name: int(value) for name, _, value in words if name in ("REG", "STACK")}
    # Shared memory is requested at launch, so the binary does not state its size.
    return found | {"SHARED": built.metadata.shared, "CODE": len(binary)}


def compile_all(
    launches: Iterable[tuple[str, Any, dict[str, Any], int]],
    dtypes: Iterable[tuple[str, int]],
    types: dict[str, Any] | None = None,
    stages: int = 3,
) -> dict[str, dict[str, int]]:
    """Compile every launch (label, kernel, constants, warps) for every (dtype, target)."""
    builds = list(dtypes)
    return {
        f"{label} {dtype} sm_{target}": compile_kernel(
            kernel, constants, dtype, target, warps, types or {}, stages
        )
        for label, kernel, constants, warps in launches
        for dtype, target in builds
    }


def main(interpret: Callable[[], Any]) -> None:
    """Save the outputs of interpreted kernels to the path given on the command line."""
    assert _common.INTERPRETED
    torch.save(interpret(), sys.argv[1])
