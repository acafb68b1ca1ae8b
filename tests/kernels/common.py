"""What the kernels' tests share: cases, gradients, tolerances, the interpreter, compilation.

Triton decides when it is imported whether kernels are interpreted, so a test file also runs as a
script, `main`: once under the interpreter, once to compile for GPUs that are not there.
"""

import json
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
# Compiled for: bfloat16 everywhere; float32, whose tiles are no larger in registers, where kernels
# have been seen to spill first.
BUILDS = [*(("bf16", target) for target in TARGETS), ("fp32", 86)]
# For kernels whose registers hold float32 whatever the dtype: there one target tells of the loads.
COMPILED = [*(("bf16", target) for target in TARGETS), ("fp32", 80)]

needs_triton = pytest.mark.skipif(not _common.HAS_TRITON, reason="Triton is not installed")


def on_cuda(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test that runs a kernel on a GPU, where falling back to the reference fails it."""
    test = pytest.mark.filterwarnings("error::RuntimeWarning")(test)
    test = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test)
    return pytest.mark.gpu(test)


def outputs(
    function: Callable[..., Any], leaves: Sequence[Tensor], grads: Sequence[Tensor]
) -> list[Tensor]:
    """What `function` returns for the leaves, then the leaves' gradients."""
    leaves = [t.detach().requires_grad_() for t in leaves]
    out = function(*leaves)
    out = [out] if isinstance(out, Tensor) else list(out)
    return [*(t.detach() for t in out), *torch.autograd.grad(out, leaves, grads)]


def check(actual: Sequence[Tensor], expected: Sequence[Tensor], names: str) -> None:
    """Within 1e-5 in float32, and within the rounding of the last cast in the halves."""
    for name, a, e in zip(names.split(), actual, expected, strict=True):
        assert a.shape == e.shape, name
        assert a.is_contiguous(), name
        # A row of one feature normalises to zero: its dx is zero and has no scale of its own.
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
    """What the script's first function returns under Triton's interpreter."""
    run_python(script, "interpret", str(folder / "outputs.pt"), interpret=True)
    return torch.load(folder / "outputs.pt", weights_only=True)


def compiled(script: str, folder: Path) -> dict[str, dict[str, int]]:
    """Registers, stack, shared memory and code size by kernel, as the script's second lists them.

    In bytes but for the registers. Triton has no stack but for spills.
    """
    run_python(script, "compile", str(folder / "usage.json"), interpret=False)
    return json.loads((folder / "usage.json").read_text())


def check_spills(usage: dict[str, dict[str, int]], count: int, record_property: Any) -> None:
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
    """The kernel as it is launched for aligned tensors of `dtype`, but for those in `types`.

    A tuple in `types` is for an argument that is one, as tensors that are summed over may be.
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
    # Shared memory is asked for at launch, so that the binary itself does not say how much.
    return found | {"SHARED": built.metadata.shared, "CODE": len(binary)}


def compile_all(
    launches: Iterable[tuple[str, Any, dict[str, Any], int]],
    dtypes: Iterable[tuple[str, int]],
    types: dict[str, Any] | None = None,
    stages: int = 3,
) -> dict[str, dict[str, int]]:
    """Every launch (label, kernel, constants, warps) for every (dtype, target)."""
    builds = list(dtypes)
    return {
        f"{label} {dtype} sm_{target}": compile_kernel(
            kernel, constants, dtype, target, warps, types or {}, stages
        )
        for label, kernel, constants, warps in launches
        for dtype, target in builds
    }


def main(interpret: Callable[[], Any], compile_: Callable[[], dict[str, dict[str, int]]]) -> None:
    task, target = sys.argv[1:]
    if task == "interpret":
        assert _common.INTERPRETED
        torch.save(interpret(), target)
    else:
        Path(target).write_text(json.dumps(compile_()))
