"""td_norm, with and without a shift, against float64: reference, kernel, gradients, errors."""

import common
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from common import DTYPES, needs_compiler, needs_triton, on_cuda
from torch import Tensor

from accelkit_kernels import _common, _time_vectors, td_norm, td_norm_reference, time_norm

FORMS = {"layer": "y dx dlevel dscale dshift", "rms": "y dx dlevel dscale"}
# One token of one feature, odd sizes, three chunks of tokens, float32 vectors for a bfloat16 x.
CASES = {
    "one": ("float32", (1, 1, 1), "contiguous"),
    "odd": ("float32", (3, 5, 7), "strided"),
    "chunks": ("float32", (2, 70, 48), "contiguous"),
    "wide": ("float32", (1, 2, 1152), "contiguous"),
    "bfloat16": ("bfloat16", (2, 33, 130), "strided"),
    "float16": ("float16", (2, 33, 130), "contiguous"),
}


def make(dtype: str, shape: tuple[int, int, int], layout: str) -> list[Tensor]:
    """Return x, level, scale, shift and the gradient of y, from a fixed seed."""
    b, n, d = shape
    gen = torch.Generator().manual_seed(b * 10_000 + n * 100 + d)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=gen).to(DTYPES[dtype])

    level = torch.rand(b, generator=gen) * 2 - 1
    if layout == "contiguous":
        x, dy, scale, shift = normal(b, n, d), normal(b, n, d), normal(4, d), normal(4, d)
    else:  # strided features, a slice of tokens, a transposed table, its own dtype
        x, dy = normal(b, d, n).transpose(1, 2), normal(b, n + 2, d)[:, 1:-1]
        scale, shift = (normal(d, 4).float().T for _ in "12")
    return [x + 3, level, scale, shift, dy]  # the offset exposes a variance that cancels


def outputs(form: str, inputs: list[Tensor], function=td_norm) -> list[Tensor]:
    leaves = inputs[:4] if form == "layer" else inputs[:3]
    return common.outputs(function, leaves, inputs[-1:])


def check(form: str, actual: list[Tensor], inputs: list[Tensor]) -> None:
    expected = outputs(form, [t.double() for t in inputs], td_norm_reference)
    x, level, scale, shift, _ = inputs
    for a, like in zip(actual, [x, x, level, scale, shift], strict=False):
        assert a.dtype == like.dtype
    common.check(actual, expected, FORMS[form])


# ----------------------------------------------------------------------------------- reference


def test_reference_at_the_ends_is_the_plain_norm():
    """With a steep sigmoid the affine is the first row above the offset and the second below."""
    torch.manual_seed(0)
    x, level = torch.randn(2, 3, 8), torch.tensor([1.0, -1.0])
    scale, shift = torch.randn(4, 8), torch.randn(4, 8)
    scale[2:], shift[2:] = torch.tensor([[200.0], [0.0]]), torch.tensor([[200.0], [0.0]])
    layer, rms = td_norm_reference(x, level, scale, shift), td_norm_reference(x, level, scale)
    for b in (0, 1):
        torch.testing.assert_close(layer[b], F.layer_norm(x[b], [8], scale[b], shift[b], 1e-5))
        torch.testing.assert_close(rms[b], F.rms_norm(x[b], [8], scale[b], 1e-16))


def test_reference_halfway():
    """By hand: sigmoid(ln 3) = 3/4, so 3/4 * 2 + 1/4 * 10 = 4; the rms of (3, 4) is sqrt(12.5)."""
    x, level = torch.tensor([[[3.0, 4.0]]]), torch.tensor([0.5])
    scale = torch.tensor([2.0, 10.0, 2 * torch.log(torch.tensor(3.0)).item(), 0.0])
    y = td_norm_reference(x, level, scale[:, None].expand(4, 2))
    torch.testing.assert_close(y, 4 * x / 12.5**0.5)


@pytest.mark.parametrize("form", FORMS)
def test_reference_passes_gradcheck(form: str):
    inputs = [t.double().requires_grad_() for t in make("float32", (2, 3, 5), "contiguous")]
    assert torch.autograd.gradcheck(td_norm_reference, inputs[: 4 if form == "layer" else 3])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_operation(form: str, case: str):
    inputs = make(*CASES[case])
    check(form, outputs(form, inputs), inputs)


@pytest.mark.parametrize("form", FORMS)
def test_no_tokens(form: str):
    y, dx, *rest = outputs(form, make("float32", (2, 0, 8), "contiguous"))
    assert y.shape == dx.shape == (2, 0, 8)
    assert not any(t.any() for t in rest)


# -------------------------------------------------------------------------------------- kernel


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> dict[str, list[Tensor]]:
    """What the kernels return for every case, and for one sample of a batch alone."""
    return common.interpreted(__file__, tmp_path_factory.mktemp("interpreted"))


@needs_triton
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_interpreted_kernel(form: str, case: str, interpreted):
    check(form, interpreted[f"{form} {case}"], make(*CASES[case]))


@needs_triton
@pytest.mark.parametrize("form", FORMS)
def test_a_sample_does_not_depend_on_its_batch(form: str, interpreted):
    for alone, batch in zip(
        interpreted[f"{form} alone"][:2], interpreted[f"{form} chunks"], strict=False
    ):
        assert torch.equal(alone[0], batch[1])


@needs_triton
def test_a_token_of_zeros(interpreted):
    y, dx, *_ = interpreted["rms zero"]
    assert not y.any()
    torch.testing.assert_close(dx, torch.full_like(dx, 1e8))  # a gradient of 1, over eps


@needs_triton
@pytest.mark.parametrize("count", [1, 2])
def test_sums_of_chunks(count: int, interpreted):
    partial, *sums = interpreted[f"sums {count}"]
    assert len(sums) == count
    for i, total in enumerate(sums):
        torch.testing.assert_close(total, partial[:, :, i].sum(1))


@needs_compiler
def test_compiles_without_spills(record_property):
    usage = compile_all()
    common.check_spills(usage, 6 * len(common.BUILDS), record_property)


@on_cuda
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "case",
    [*CASES.values(), ("bfloat16", (2, 256, 1152), "strided")],
    ids=lambda c: f"{c[0]}{c[1]}",
)
def test_kernel_on_cuda(form: str, case: tuple[str, tuple[int, int, int], str]):
    inputs = [t.cuda() for t in make(*case)]
    check(form, outputs(form, inputs), inputs)


# -------------------------------------------------------------------------------- registration


@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form: str):
    x, level, scale, shift, dy = make("float32", (2, 3, 8), "strided")
    tensors = [x, level, scale, shift]
    given = [t if i < 3 or form == "layer" else None for i, t in enumerate(tensors)]
    torch.library.opcheck(time_norm._td_norm_backward, (dy, *given, 1e-5))
    leaves = [t if t is None else t.detach().requires_grad_() for t in given]
    torch.library.opcheck(time_norm._td_norm, (*leaves, 1e-5))


GOOD = {"x": torch.zeros(2, 3, 4), "level": torch.zeros(2), "scale": torch.zeros(4, 4)}
GOOD["shift"] = GOOD["scale"]


@pytest.mark.parametrize(
    ("bad", "error", "says"),
    [
        ({"x": torch.zeros(2, 3, 0)}, ValueError, "D at least 1"),
        ({"x": torch.zeros(2, 3, 4).double()}, TypeError, "x is torch.float64, expected float32"),
        (
            {"level": torch.zeros(3)},
            ValueError,
            r"level has shape \(3,\), expected \(B,\) = \(2,\)",
        ),
        ({"level": torch.zeros(2).half()}, TypeError, "level is torch.float16, expected"),
        ({"level": 0.5}, TypeError, "level is a float"),
        ({"scale": torch.zeros(2, 4)}, ValueError, r"scale has shape \(2, 4\), expected \(4, D\)"),
        ({"scale": torch.zeros(4, 4).half()}, TypeError, "scale is torch.float16, expected"),
        ({"shift": torch.zeros(4, 5)}, ValueError, r"shift has shape \(4, 5\)"),
        ({"shift": torch.zeros(4, 4).half()}, TypeError, "shift is torch.float16, expected"),
        ({"shift": torch.zeros(4, 4, device="meta")}, ValueError, "shift is on meta and x on cpu"),
        ({"eps": 0.0}, ValueError, "eps is 0.0"),
    ],
)
def test_bad_input(bad: dict, error: type[Exception], says: str):
    with pytest.raises(error, match=says):
        td_norm(**GOOD | bad)


# ------------------------------------------------------------------------------- as a script


def interpret() -> dict[str, list[Tensor]]:
    inputs = {case: make(*spec) for case, spec in CASES.items()}
    x, level, scale, shift, dy = inputs["chunks"]
    inputs["alone"] = [x[1:], level[1:], scale, shift, dy[1:]]
    assert all(_common.kernel_serves(x, time_norm.MAX_WIDTH) for x, *_ in inputs.values())
    found = {f"{form} {case}": outputs(form, t) for form in FORMS for case, t in inputs.items()}
    zero, level, scale = torch.zeros(1, 2, 8), torch.zeros(1), torch.ones(4, 8)
    found["rms zero"] = outputs("rms", [zero, level, scale, scale, zero + 1])
    for count in (1, 2):
        partial = torch.randn(2, 5, count, 300)
        found[f"sums {count}"] = [partial, *_common.sum_chunks(partial, torch.float32)]
    return found


def compile_all() -> dict[str, dict[str, int]]:
    width, tokens, warps = _common.tile(1152)
    size = {"WIDTH": width, "TOKENS": tokens}
    launches = [
        ("at", _time_vectors._at_kernel, {"WIDTH": 256}, 4),
        ("sum", _common._sum_kernel, {"WIDTH": 256, "COUNT": 2}, 4),
    ]
    for form, rms in (("layer", {"RMS": False}), ("rms", {"RMS": True})):
        backward = size | rms | {"CHUNK": _common.CHUNK}
        launches += [
            (f"{form} forward", time_norm._forward_kernel, size | rms, warps),
            (f"{form} backward", time_norm._backward_kernel, backward, warps),
        ]
    wide = ["level_ptr", "gamma_ptr", "beta_ptr", "out_ptr", "first_ptr", "last_ptr"]
    return common.compile_all(launches, common.BUILDS, dict.fromkeys(wide, "*fp32"))


if __name__ == "__main__":
    common.main(interpret)
