"""layernorm_modulate against float64: reference, interpreted kernel, gradients, registration.

Triton decides when it is imported whether kernels are interpreted, so this file also runs as a
script: once under the interpreter, once to compile for GPUs that are not there.
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from accelkit_kernels import adaln, layernorm_modulate, layernorm_modulate_reference

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# One token of one feature, odd sizes, three chunks of tokens, the width of DiT-XL.
SHAPES = [(1, 1, 1), (3, 5, 7), (2, 70, 48), (1, 2, 1152)]
LAYOUTS = ["contiguous", "strided"]
CASES = {
    "-".join([dtype, "x".join(map(str, shape)), layout]): (dtype, shape, layout)
    for dtype, shape, layout in itertools.product(DTYPES, SHAPES, LAYOUTS)
}
COMPILED_WIDTHS = [64, 1152]
TARGETS = [80, 86, 90, 100]

needs_triton = pytest.mark.skipif(not adaln.HAS_TRITON, reason="Triton is not installed")


def make(dtype: str, shape: tuple[int, int, int], layout: str) -> list[Tensor]:
    """x, shift, scale and the gradient of the output, from a fixed seed."""
    b, n, d = shape
    gen = torch.Generator().manual_seed(b * 10_000 + n * 100 + d)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=gen).to(DTYPES[dtype])

    if layout == "contiguous":
        x, shift, scale, dy = normal(b, n, d), normal(b, d), normal(b, d), normal(b, n, d)
    else:  # features that are far apart, a slice of tokens, and DiT's chunks of one projection
        x = normal(b, d, n).transpose(1, 2)
        dy = normal(b, n + 2, d)[:, 1:-1]
        shift, scale = normal(b, 6 * d).chunk(6, dim=1)[1:3]
    return [x + 3, shift, scale, dy]  # an offset shows a variance that cancels


def outputs(inputs: list[Tensor], function=layernorm_modulate) -> list[Tensor]:
    """y, dx, dshift, dscale."""
    *leaves, dy = (t.detach() for t in inputs)
    for leaf in leaves:
        leaf.requires_grad_()
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def check(actual: list[Tensor], inputs: list[Tensor]) -> None:
    """Within 1e-5 in float32, and within the rounding of the last cast in the halves."""
    expected = outputs([t.double() for t in inputs], layernorm_modulate_reference)
    for name, a, e in zip(["y", "dx", "dshift", "dscale"], actual, expected, strict=True):
        assert a.dtype == inputs[0].dtype, name
        assert a.is_contiguous(), name
        # A row of one feature normalises to zero: its dx is zero and has no scale of its own.
        atol = 1e-5 * max(1.0, float(e.abs().max()))
        rtol = max(1e-5, torch.finfo(a.dtype).eps)
        torch.testing.assert_close(a.double(), e, rtol=rtol, atol=atol, msg=lambda m, n=name: n + m)


def run_python(*args: str, interpret: bool) -> None:
    env = os.environ | {
        "TRITON_INTERPRET": str(int(interpret)),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    done = subprocess.run(
        [sys.executable, *args], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# ----------------------------------------------------------------------------------- reference


def test_reference_is_the_adaptive_norm_of_diffusers():
    norms = pytest.importorskip("diffusers.models.normalization")
    torch.manual_seed(0)
    norm = norms.AdaLayerNormContinuous(24, 16, elementwise_affine=False, eps=1e-6)
    x, cond = torch.randn(2, 5, 24), torch.randn(2, 16)
    scale, shift = norm.linear(norm.silu(cond)).chunk(2, dim=1)
    torch.testing.assert_close(layernorm_modulate_reference(x, shift, scale), norm(x, cond))


def test_reference_passes_gradcheck():
    gen = torch.Generator().manual_seed(0)
    sizes = [(2, 3, 5), (2, 5), (2, 5)]
    inputs = [torch.randn(s, generator=gen, dtype=torch.float64, requires_grad=True) for s in sizes]
    assert torch.autograd.gradcheck(layernorm_modulate_reference, inputs)


@pytest.mark.parametrize("case", CASES)
def test_operation(case: str):
    inputs = make(*CASES[case])
    check(outputs(inputs), inputs)


def test_no_tokens():
    y, dx, dshift, dscale = outputs(make("float32", (2, 0, 8), "contiguous"))
    assert y.shape == dx.shape == (2, 0, 8)
    assert not dshift.any()
    assert not dscale.any()


def test_runs_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch
from accelkit_kernels import adaln, layernorm_modulate, layernorm_modulate_reference
assert not adaln.HAS_TRITON
inputs = torch.randn(2, 3, 8), torch.randn(2, 8), torch.randn(2, 8)
assert torch.equal(layernorm_modulate(*inputs), layernorm_modulate_reference(*inputs))
"""
    run_python("-c", code, interpret=True)


# -------------------------------------------------------------------------------------- kernel


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> dict[str, list[Tensor]]:
    """What the kernels give for every case, and for one sample of a batch on its own."""
    folder = tmp_path_factory.mktemp("interpreted")
    inputs = {case: make(*spec) for case, spec in CASES.items()}
    inputs["alone"] = [t[1:2] for t in inputs["float32-2x70x48-contiguous"]]
    torch.save(inputs, folder / "inputs.pt")
    run_python(
        __file__, "interpret", str(folder / "inputs.pt"), str(folder / "outputs.pt"), interpret=True
    )
    return torch.load(folder / "outputs.pt", weights_only=True)


@needs_triton
@pytest.mark.parametrize("case", CASES)
def test_interpreted_kernel(case: str, interpreted):
    check(interpreted[case], make(*CASES[case]))


@needs_triton
def test_a_sample_does_not_depend_on_its_batch(interpreted):
    for alone, batch in zip(
        interpreted["alone"], interpreted["float32-2x70x48-contiguous"], strict=True
    ):
        assert torch.equal(alone[0], batch[1])


@needs_triton
def test_kernel_serves_what_fits_in_registers(monkeypatch):
    monkeypatch.setattr(adaln, "INTERPRETED", True)
    assert adaln._kernel_serves(torch.empty(1, 1, adaln.MAX_WIDTH))
    assert not adaln._kernel_serves(torch.empty(1, 1, adaln.MAX_WIDTH + 1))
    assert not adaln._kernel_serves(torch.empty(2, 0, 64))


@pytest.fixture(scope="module")
def stacks(tmp_path_factory) -> dict[str, int]:
    """Bytes of stack a thread needs, by compilation; Triton has no stack but for spills."""
    found = tmp_path_factory.mktemp("compiled") / "stacks.json"
    run_python(__file__, "compile", str(found), interpret=False)
    return json.loads(found.read_text())


@needs_triton
@pytest.mark.parametrize("kernel", ["_forward_kernel", "_backward_kernel", "_sum_kernel"])
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_spills(kernel: str, target: int, stacks):
    mine = {k: v for k, v in stacks.items() if k.startswith(f"{kernel} sm_{target} ")}
    assert len(mine) == 2 * len(COMPILED_WIDTHS)
    assert not any(mine.values()), mine


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "case",
    [
        *CASES.values(),
        ("bfloat16", (2, 256, 1152), "strided"),
        ("float32", (2, 9, 8192), "contiguous"),
    ],
)
def test_kernel_on_cuda(case: tuple[str, tuple[int, int, int], str]):
    inputs = [t.cuda() for t in make(*case)]
    assert adaln._kernel_serves(inputs[0])
    actual = outputs(inputs)
    check(actual, inputs)
    for a, r in zip(actual, outputs(inputs, layernorm_modulate_reference), strict=True):
        eps = 2 * torch.finfo(a.dtype).eps
        torch.testing.assert_close(
            a, r, rtol=max(1e-5, eps), atol=1e-5 * float(r.abs().max()) + eps
        )


# -------------------------------------------------------------------------------- registration


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout: str):
    x, shift, scale, dy = make("float32", (2, 3, 8), layout)
    torch.library.opcheck(adaln._layernorm_modulate_backward, (dy, x, scale, 1e-6))
    leaves = [t.detach().requires_grad_() for t in (x, shift, scale)]
    torch.library.opcheck(adaln._layernorm_modulate, (*leaves, 1e-6))


def test_compiles_into_one_graph():
    inputs = make("float32", (2, 3, 8), "strided")
    compiled = torch.compile(layernorm_modulate, backend="aot_eager", fullgraph=True)
    for actual, eager in zip(outputs(inputs, compiled), outputs(inputs), strict=True):
        assert torch.equal(actual, eager)


GOOD = {"x": torch.zeros(2, 3, 4), "shift": torch.zeros(2, 4), "scale": torch.zeros(2, 4)}


@pytest.mark.parametrize(
    ("bad", "error", "says"),
    [
        ({"x": torch.zeros(3, 4)}, ValueError, r"x has shape \(3, 4\), expected \(B, N, D\)"),
        ({"x": torch.zeros(2, 3, 0)}, ValueError, "D at least 1"),
        ({"x": torch.zeros(2, 3, 4).double()}, TypeError, "float64, expected float32"),
        ({"x": torch.zeros(2, 3, 4).half()}, TypeError, "shift is torch.float32 and x is"),
        ({"shift": torch.zeros(4)}, ValueError, r"shift has shape \(4,\), expected \(B, D\)"),
        ({"shift": torch.zeros(2, 4).bfloat16()}, TypeError, "shift is torch.bfloat16"),
        ({"scale": torch.zeros(2, 5)}, ValueError, r"scale has shape \(2, 5\).*= \(2, 4\)"),
        ({"scale": torch.zeros(2, 1, 4)}, ValueError, r"scale has shape \(2, 1, 4\)"),
        ({"scale": torch.zeros(2, 4, device="meta")}, ValueError, "scale is on meta"),
        ({"eps": 0.0}, ValueError, "eps is 0.0"),
        ({"shift": [0.0]}, TypeError, "shift is a list"),
    ],
)
def test_bad_input(bad: dict, error: type[Exception], says: str):
    with pytest.raises(error, match=says):
        layernorm_modulate(**GOOD | bad)


# ------------------------------------------------------------------------------- as a script


def interpret(source: str, target: str) -> None:
    inputs = torch.load(source, weights_only=True)
    assert all(adaln._kernel_serves(x) for x, *_ in inputs.values())
    torch.save({case: outputs(tensors) for case, tensors in inputs.items()}, target)


def compile_all(target: str) -> None:
    """Every kernel as it is launched for aligned tensors, and the stack each binary asks for."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    dump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    stacks = {}
    for features, dtype, arch in itertools.product(COMPILED_WIDTHS, ["bf16", "fp32"], TARGETS):
        width, tokens, warps = adaln._tile(features)
        tile = {"WIDTH": width, "TOKENS": tokens}
        for kernel, constants, num_warps in [
            (adaln._forward_kernel, tile, warps),
            (adaln._backward_kernel, tile | {"CHUNK": adaln.CHUNK}, warps),
            (adaln._sum_kernel, {"WIDTH": 256}, 4),
        ]:
            types = {"partial_ptr": "*fp32", "eps": "fp32"} | dict.fromkeys(constants, "constexpr")
            signature = {
                name: types.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")
                for name in kernel.arg_names
            }
            aligned = {
                (i,): [["tt.divisibility", 16]]
                for i, name in enumerate(kernel.arg_names)
                if name == "D" or name.endswith(("_ptr", "_b", "_n"))
            }
            binary = triton.compile(
                ASTSource(kernel, signature, constants, aligned),
                target=GPUTarget("cuda", arch, 32),
                options={"num_warps": num_warps, "enable_fp_fusion": True},
            ).asm["cubin"]
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(binary)
                file.flush()
                usage = subprocess.check_output([dump, "-res-usage", file.name], text=True)
            stack = usage.split("STACK:")[1].split()[0]
            stacks[f"{kernel.__name__} sm_{arch} {dtype} D={features}"] = int(stack)
    Path(target).write_text(json.dumps(stacks))


if __name__ == "__main__":
    task, *paths = sys.argv[1:]
    {"interpret": interpret, "compile": compile_all}[task](*paths)
