"""Adaptive norm, gated residual and their seam against float64, in the reference and the kernel."""

import common
import pytest
import torch
from common import DTYPES, needs_compiler, needs_triton, on_cuda
from torch import Tensor

from accelkit_kernels import (
    _common,
    adaln,
    gated,
    gated_residual,
    gated_residual_layernorm_modulate,
    gated_residual_layernorm_modulate_reference,
    gated_residual_reference,
    layernorm_modulate,
    layernorm_modulate_reference,
    seam,
)

# One token of one feature, odd sizes, three chunks of tokens, the width of DiT-XL, and more than
# one block of features in half precision.
CASES = {
    "one": ("float32", (1, 1, 1), "contiguous"),
    "odd": ("float32", (3, 5, 7), "strided"),
    "chunks": ("float32", (2, 70, 48), "contiguous"),
    "wide": ("float32", (1, 2, 1152), "strided"),
    "bfloat16": ("bfloat16", (2, 33, 130), "strided"),
    "float16": ("float16", (2, 33, 130), "contiguous"),
}
# Function, reference, and the inputs it takes of those that `make` returns.
OPERATIONS = {
    "norm": (layernorm_modulate, layernorm_modulate_reference, (0, 3, 4)),
    "residual": (gated_residual, gated_residual_reference, (0, 1, 2)),
    "seam": (
        gated_residual_layernorm_modulate,
        gated_residual_layernorm_modulate_reference,
        (0, 1, 2, 3, 4),
    ),
}


def make(dtype: str, shape: tuple[int, int, int], layout: str) -> list[Tensor]:
    """Return x, y, gate, shift and scale, from a fixed seed."""
    b, n, d = shape
    gen = torch.Generator().manual_seed(b * 10_000 + n * 100 + d)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=gen).to(DTYPES[dtype])

    if layout == "contiguous":
        x, y = normal(b, n, d), normal(b, n, d)
        vectors = [normal(b, d) for _ in range(3)]
    else:  # strided features, a slice of tokens, and chunks of one projection as in DiT
        x, y = normal(b, d, n).transpose(1, 2), normal(b, n + 2, d)[:, 1:-1]
        vectors = list(normal(b, 6 * d).chunk(6, dim=1)[1:4])
    return [x + 3, y, *vectors]  # the offset exposes a variance that cancels


def outputs(operation: str, inputs: list[Tensor], function=None) -> list[Tensor]:
    op, _, taken = OPERATIONS[operation]
    out = (function or op)(*(inputs[i] for i in taken))
    return [out] if isinstance(out, Tensor) else list(out)


def check(operation: str, actual: list[Tensor], inputs: list[Tensor]) -> None:
    wide = [t.double() for t in inputs]
    expected = outputs(operation, wide, OPERATIONS[operation][1])
    if operation == "seam":  # its norm reads the stored h, rounded or not
        expected[1] = layernorm_modulate_reference(actual[0].double(), *wide[3:])
    assert all(t.dtype == inputs[0].dtype for t in actual)
    common.check(actual, expected, "first second" if operation == "seam" else "only")


# ----------------------------------------------------------------------------------- reference


def test_reference_is_the_adaptive_norm_of_diffusers():
    norms = pytest.importorskip("diffusers.models.normalization")
    torch.manual_seed(0)
    norm = norms.AdaLayerNormContinuous(24, 16, elementwise_affine=False, eps=1e-6)
    x, cond = torch.randn(2, 5, 24), torch.randn(2, 16)
    scale, shift = norm.linear(norm.silu(cond)).chunk(2, dim=1)
    torch.testing.assert_close(layernorm_modulate_reference(x, shift, scale), norm(x, cond))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_gradients_are_those_of_the_reference(operation: str):
    function, reference, taken = OPERATIONS[operation]
    inputs = [make("float32", (2, 3, 5), "strided")[i] for i in taken]
    assert torch.autograd.gradcheck(reference, [t.double().requires_grad_() for t in inputs])
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(*leaves)
    with torch.no_grad():
        same = function(*leaves)
    for a, b in zip(*((t,) if isinstance(t, Tensor) else t for t in (out, same)), strict=True):
        assert a.requires_grad
        assert not b.requires_grad
        assert a.is_contiguous()
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operation(operation: str, case: str):
    inputs = make(*CASES[case])
    check(operation, outputs(operation, inputs), inputs)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_tokens(operation: str):
    for t in outputs(operation, make("float32", (2, 0, 8), "contiguous")):
        assert t.shape == (2, 0, 8)


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (ModuleNotFoundError("no triton", name="triton"), "Triton is not installed"),
        (ModuleNotFoundError("no numpy", name="numpy"), "Triton lacks numpy"),
        (
            ImportError("libtriton.so: undefined symbol"),
            "Triton cannot be imported (ImportError: libtriton.so: undefined symbol)",
        ),
    ],
    ids=["missing", "incomplete", "broken"],
)
def test_why_triton_cannot_be_used(monkeypatch, error, problem):
    def fail(name):
        raise error

    monkeypatch.setattr(_common.importlib, "import_module", fail)
    assert _common._triton_problem() == problem


def test_runs_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch
from accelkit_kernels import TRITON_PROBLEM, layernorm_modulate, layernorm_modulate_reference
assert TRITON_PROBLEM == "Triton is not installed"
inputs = torch.randn(2, 3, 8), torch.randn(2, 8), torch.randn(2, 8)
assert torch.equal(layernorm_modulate(*inputs), layernorm_modulate_reference(*inputs))
"""
    common.run_python("-c", code, interpret=True)


# -------------------------------------------------------------------------------------- kernel


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> dict[str, list[Tensor]]:
    """What the kernels return for every case, and for one sample of a batch alone."""
    return common.interpreted(__file__, tmp_path_factory.mktemp("interpreted"))


@needs_triton
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_interpreted_kernel(operation: str, case: str, interpreted):
    check(operation, interpreted[f"{operation} {case}"], make(*CASES[case]))


@needs_triton
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_sample_does_not_depend_on_its_batch(operation: str, interpreted):
    batches = interpreted[f"{operation} chunks"]
    for alone, batch in zip(interpreted[f"{operation} alone"], batches, strict=True):
        assert torch.equal(alone[0], batch[1])


@needs_triton
def test_the_seam_is_its_parts(interpreted):
    for case in CASES:
        h, seam_h = interpreted[f"residual {case}"][0], interpreted[f"seam {case}"][0]
        assert torch.equal(h, seam_h)


@needs_compiler
def test_compiles_without_spills(record_property):
    usage = compile_all()
    common.check_spills(usage, 3 * len(common.BUILDS) + 2 * len(EDGES), record_property)


@on_cuda
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    "case",
    [
        *CASES.values(),
        ("bfloat16", (2, 256, 1152), "strided"),
        ("float32", (2, 9, 8192), "contiguous"),
    ],
    ids=lambda c: f"{c[0]}{c[1]}",
)
def test_kernel_on_cuda(operation: str, case: tuple[str, tuple[int, int, int], str]):
    inputs = [t.cuda() for t in make(*case)]
    assert _common.kernel_serves(inputs[0], adaln.MAX_WIDTH)
    check(operation, outputs(operation, inputs), inputs)


# -------------------------------------------------------------------------------- registration


def test_opcheck():
    x, y, gate, shift, scale = make("float32", (2, 3, 8), "strided")
    torch.library.opcheck(adaln._layernorm_modulate, (x, shift, scale, 1e-6))
    torch.library.opcheck(gated._gated_residual, (x, y, gate))
    torch.library.opcheck(seam._seam, (x, y, gate, shift, scale, 1e-6))


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("grad", [False, True])
def test_compiles_into_one_graph(operation: str, grad: bool):
    inputs = [t.requires_grad_(grad) for t in make("float32", (2, 3, 8), "strided")]
    compiled = torch.compile(OPERATIONS[operation][0], backend="aot_eager", fullgraph=True)
    for a, b in zip(outputs(operation, inputs, compiled), outputs(operation, inputs), strict=True):
        assert torch.equal(a, b)
        assert a.requires_grad == grad


TOKENS, VECTOR = torch.zeros(2, 3, 4), torch.zeros(2, 4)
GOOD = {"x": TOKENS, "y": TOKENS, "gate": VECTOR, "shift": VECTOR, "scale": VECTOR}
BAD = [
    ({"x": torch.zeros(3, 4)}, ValueError, r"x has shape \(3, 4\), expected \(B, N, D\)"),
    ({"x": torch.zeros(2, 3, 0)}, ValueError, "D at least 1"),
    ({"x": TOKENS.double()}, TypeError, "float64, expected float32"),
    ({"y": torch.zeros(2, 1, 4)}, ValueError, r"y has shape \(2, 1, 4\).*= \(2, 3, 4\) from x"),
    ({"y": TOKENS.half()}, TypeError, "y is torch.float16 and x is torch.float32"),
    ({"y": TOKENS.to("meta")}, ValueError, "y is on meta and x on cpu"),
    ({"gate": torch.zeros(2, 1, 4)}, ValueError, r"gate has shape \(2, 1, 4\), expected \(B, D"),
    ({"gate": VECTOR.half()}, TypeError, "gate is torch.float16"),
    ({"gate": 1.0}, TypeError, "gate is a float"),
    ({"shift": torch.zeros(4)}, ValueError, r"shift has shape \(4,\), expected \(B, D\)"),
    ({"shift": VECTOR.bfloat16()}, TypeError, "shift is torch.bfloat16"),
    ({"shift": [0.0]}, TypeError, "shift is a list"),
    ({"scale": torch.zeros(2, 5)}, ValueError, r"scale has shape \(2, 5\).*= \(2, 4\)"),
    ({"scale": torch.zeros(2, 4, device="meta")}, ValueError, "scale is on meta"),
    ({"eps": 0.0}, ValueError, "eps is 0.0"),
]


@pytest.mark.parametrize(("bad", "error", "says"), BAD)
def test_bad_input(bad: dict, error: type[Exception], says: str):
    given = GOOD | bad
    with pytest.raises(error, match=says):
        gated_residual_layernorm_modulate(**given)
    for function, names in (
        (layernorm_modulate, {"x", "shift", "scale", "eps"}),
        (gated_residual, {"x", "y", "gate"}),
    ):
        if bad.keys() <= names:
            with pytest.raises(error, match=says):
                function(**{name: t for name, t in given.items() if name in names})


# ------------------------------------------------------------------------------- as a script

# The narrow tile of many tokens, and the widest.
EDGES = [("bf16", 80, 64), ("fp32", 86, adaln.MAX_WIDTH)]


def interpret() -> dict[str, list[Tensor]]:
    inputs = {case: make(*spec) for case, spec in CASES.items()}
    inputs["alone"] = [t[1:2] for t in inputs["chunks"]]
    assert all(_common.kernel_serves(x, adaln.MAX_WIDTH) for x, *_ in inputs.values())
    return {f"{op} {case}": outputs(op, t) for op in OPERATIONS for case, t in inputs.items()}


def compile_all() -> dict[str, dict[str, int]]:
    block = {"WIDTH": gated.WIDTH, "CHUNK": _common.CHUNK}
    usage = common.compile_all([("residual", gated._forward_kernel, block, 4)], common.BUILDS)
    sizes = [(1152, common.BUILDS), *((width, [(dtype, sm)]) for dtype, sm, width in EDGES)]
    for features, builds in sizes:
        width, tokens, warps = _common.tile(features)
        size = {"WIDTH": width, "TOKENS": tokens}
        launches = [
            (f"{name} D={features}", module._forward_kernel, size, warps)
            for name, module in (("norm", adaln), ("seam", seam))
        ]
        usage |= common.compile_all(launches, builds)
    return usage


if __name__ == "__main__":
    common.main(interpret)
