"""gated_residual, alone and with the norm that follows it, against float64 and against parts."""

import common
import pytest
import torch
from common import DTYPES, needs_triton, on_cuda
from torch import Tensor

from accelkit_kernels import (
    _common,
    gated,
    gated_residual,
    gated_residual_layernorm_modulate,
    gated_residual_layernorm_modulate_reference,
    gated_residual_reference,
    layernorm_modulate_reference,
    seam,
)

# One token of one feature, odd sizes, three chunks of tokens, more than one block of features.
CASES = {
    "one": ("float32", (1, 1, 1), "contiguous"),
    "odd": ("float32", (3, 5, 7), "strided"),
    "chunks": ("float32", (2, 70, 48), "contiguous"),
    "wide": ("float32", (1, 2, 1152), "strided"),
    "bfloat16": ("bfloat16", (2, 33, 130), "strided"),
    "float16": ("float16", (2, 33, 130), "contiguous"),
}
# By operation: function, reference, the inputs it takes, how many results.
OPERATIONS = {
    "gated_residual": (gated_residual, gated_residual_reference, 3, 1),
    "seam": (
        gated_residual_layernorm_modulate,
        gated_residual_layernorm_modulate_reference,
        5,
        2,
    ),
}
NAMES = {"gated_residual": "h dx dy dgate", "seam": "h m dx dy dgate dshift dscale"}


def make(dtype: str, shape: tuple[int, int, int], layout: str) -> list[Tensor]:
    """x, y, gate, shift, scale and the gradients of h and m, from a fixed seed."""
    b, n, d = shape
    gen = torch.Generator().manual_seed(b * 10_000 + n * 100 + d)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=gen).to(DTYPES[dtype])

    if layout == "contiguous":
        tokens = [normal(b, n, d) for _ in range(4)]
        vectors = [normal(b, d) for _ in range(3)]
    else:  # features that are far apart, a slice of tokens, and DiT's chunks of one projection
        tokens = [normal(b, d, n).transpose(1, 2), *(normal(b, n + 2, d)[:, 1:-1] for _ in "123")]
        vectors = list(normal(b, 6 * d).chunk(6, dim=1)[1:4])
    x, y, dh, dm = tokens
    return [x + 3, y, *vectors, dh, dm]  # an offset shows a variance that cancels


def outputs(operation: str, inputs: list[Tensor], function=None) -> list[Tensor]:
    """The results and the gradients of all inputs."""
    op, _, leaves, results = OPERATIONS[operation]
    return common.outputs(function or op, inputs[:leaves], inputs[5 : 5 + results])


def check(operation: str, actual: list[Tensor], inputs: list[Tensor]) -> None:
    stored = actual[0].double()  # the h that the norm is documented to read, however it was rounded

    def seam_from_stored(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor):
        h = gated_residual_reference(x, y, gate)
        return h, layernorm_modulate_reference(h + (stored - h).detach(), shift, scale)

    exact = {"gated_residual": gated_residual_reference, "seam": seam_from_stored}
    expected = outputs(operation, [t.double() for t in inputs], exact[operation])
    assert all(t.dtype == inputs[0].dtype for t in actual)
    if operation == "gated_residual":  # its dx is the gradient of h as it came
        actual = [t.contiguous() for t in actual]
    common.check(actual, expected, NAMES[operation])


# ----------------------------------------------------------------------------------- reference


@pytest.mark.parametrize("operation", OPERATIONS)
def test_reference_passes_gradcheck(operation: str):
    _, reference, leaves, _ = OPERATIONS[operation]
    inputs = [t.double().requires_grad_() for t in make("float32", (2, 3, 5), "contiguous")]
    assert torch.autograd.gradcheck(reference, inputs[:leaves])


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("case", CASES)
def test_operation(operation: str, case: str):
    inputs = make(*CASES[case])
    check(operation, outputs(operation, inputs), inputs)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_tokens(operation: str):
    for t in outputs(operation, make("float32", (2, 0, 8), "contiguous")):
        assert t.shape == (2, 0, 8) if t.ndim == 3 else not t.any()


# -------------------------------------------------------------------------------------- kernel


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> dict[str, list[Tensor]]:
    """What the kernels give for every case, and for one sample of a batch on its own."""
    return common.interpreted(__file__, tmp_path_factory.mktemp("interpreted"))


@needs_triton
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("case", CASES)
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
        h, seam_h = interpreted[f"gated_residual {case}"][0], interpreted[f"seam {case}"][0]
        assert torch.equal(h, seam_h)


@pytest.fixture(scope="module")
def usage(tmp_path_factory) -> dict[str, dict[str, int]]:
    return common.compiled(__file__, tmp_path_factory.mktemp("compiled"))


@needs_triton
def test_compiles_without_spills(usage, record_property):
    common.check_spills(usage, 5 * len(common.BUILDS), record_property)


@on_cuda
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    "case",
    [*CASES.values(), ("bfloat16", (2, 256, 1152), "strided")],
    ids=lambda c: f"{c[0]}{c[1]}",
)
def test_kernel_on_cuda(operation: str, case: tuple[str, tuple[int, int, int], str]):
    inputs = [t.cuda() for t in make(*case)]
    check(operation, outputs(operation, inputs), inputs)


# -------------------------------------------------------------------------------- registration


def test_opcheck():
    *leaves, dh, dm = make("float32", (2, 3, 8), "strided")
    x, y, gate, _, scale = leaves
    torch.library.opcheck(gated._gated_residual_backward, (dh, y, gate))
    torch.library.opcheck(seam._seam_backward, (dh, dm, x.contiguous(), y, gate, scale, 1e-6))
    leaves = [t.detach().requires_grad_() for t in leaves]
    torch.library.opcheck(gated._gated_residual, tuple(leaves[:3]))
    torch.library.opcheck(seam._seam, (*leaves, 1e-6))


TOKENS, VECTOR = torch.zeros(2, 3, 4), torch.zeros(2, 4)
GOOD = {"x": TOKENS, "y": TOKENS, "gate": VECTOR, "shift": VECTOR, "scale": VECTOR}


@pytest.mark.parametrize(
    ("bad", "error", "says"),
    [
        ({"x": torch.zeros(3, 4)}, ValueError, r"x has shape \(3, 4\), expected \(B, N, D\)"),
        ({"x": TOKENS.double()}, TypeError, "float64, expected float32"),
        ({"y": torch.zeros(2, 1, 4)}, ValueError, r"y has shape \(2, 1, 4\).*= \(2, 3, 4\) from x"),
        ({"y": TOKENS.half()}, TypeError, "y is torch.float16 and x is torch.float32"),
        ({"y": TOKENS.to("meta")}, ValueError, "y is on meta and x on cpu"),
        (
            {"gate": torch.zeros(2, 1, 4)},
            ValueError,
            r"gate has shape \(2, 1, 4\), expected \(B, D",
        ),
        ({"gate": VECTOR.half()}, TypeError, "gate is torch.float16"),
        ({"gate": 1.0}, TypeError, "gate is a float"),
        ({"shift": torch.zeros(4)}, ValueError, r"shift has shape \(4,\)"),
        ({"scale": torch.zeros(2, 5)}, ValueError, r"scale has shape \(2, 5\).*= \(2, 4\)"),
        ({"eps": 0.0}, ValueError, "eps is 0.0"),
    ],
)
def test_bad_input(bad: dict, error: type[Exception], says: str):
    with pytest.raises(error, match=says):
        gated_residual_layernorm_modulate(**GOOD | bad)
    if bad.keys() <= {"x", "y", "gate"}:
        with pytest.raises(error, match=says):
            gated_residual(**{name: (GOOD | bad)[name] for name in ("x", "y", "gate")})


# ------------------------------------------------------------------------------- as a script


def interpret() -> dict[str, list[Tensor]]:
    inputs = {case: make(*spec) for case, spec in CASES.items()}
    inputs["alone"] = [t[1:2] for t in inputs["chunks"]]
    assert all(_common.kernel_serves(x, seam.MAX_WIDTH) for x, *_ in inputs.values())
    return {f"{op} {case}": outputs(op, t) for op in OPERATIONS for case, t in inputs.items()}


def compile_all() -> dict[str, dict[str, int]]:
    width, tokens, warps = _common.tile(1152)
    block = {"WIDTH": gated.WIDTH, "CHUNK": _common.CHUNK}
    size = {"WIDTH": width, "TOKENS": tokens}
    launches = [
        ("gated forward", gated._forward_kernel, block, 4),
        ("gated backward", gated._backward_kernel, block, 4),
        ("seam forward", seam._forward_kernel, size, warps),
        ("seam backward", seam._backward_kernel, size | {"CHUNK": _common.CHUNK}, warps),
        ("sum", _common._sum_kernel, {"WIDTH": 256, "COUNT": 3}, 4),
    ]
    return common.compile_all(launches, common.BUILDS)


if __name__ == "__main__":
    common.main(interpret, compile_all)
