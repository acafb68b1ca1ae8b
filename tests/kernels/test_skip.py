"""skip_linear against float64: reference, interpreted kernel, gradients, registration."""

import itertools

import common
import pytest
import torch
from common import DTYPES, TARGETS, needs_triton, on_cuda
from torch import Tensor

from accelkit_kernels import skip as operation
from accelkit_kernels import skip_linear, skip_linear_reference

# (B, N, D, outputs, skips): one token of one feature; more than one tile of tokens and of outputs,
# with D no multiple of a step; three skips folded into one. No bias where there is one output.
ONE, TILES, FOLDED = (1, 1, 1, 1, 1), (3, 50, 70, 130, 1), (2, 9, 16, 24, 3)
CASES = {
    "-".join([dtype, "x".join(map(str, size)), layout]): (dtype, size, layout)
    for dtype, size, layout in [
        ("float32", ONE, "contiguous"),
        ("float32", TILES, "strided"),
        ("bfloat16", TILES, "contiguous"),
        ("bfloat16", FOLDED, "strided"),
        ("float16", FOLDED, "contiguous"),
    ]
}


def make(dtype: str, size: tuple[int, ...], layout: str) -> list[Tensor]:
    """x, weight, bias, the skips and the gradient of the output, from a fixed seed."""
    b, n, d, out, k = size
    gen = torch.Generator().manual_seed(sum(size))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen).to(DTYPES[dtype])

    if layout == "contiguous":
        x, *skips = (normal(b, n, d) for _ in range(k + 1))
        weight, dy = normal(out, (k + 1) * d), normal(b, n, out)
    else:  # features that are far apart, patches behind the extra tokens, a part of a wider weight
        x = normal(b, d, n).transpose(1, 2)
        skips = [normal(b, n + 2, d)[:, 2:] for _ in range(k)]
        weight, dy = normal(out, (k + 2) * d)[:, d:], normal(b, n + 1, out)[:, 1:]
    return [x, weight / d**0.5, normal(out), *skips, dy]


def forward(x: Tensor, weight: Tensor, bias: Tensor, *skips: Tensor) -> Tensor:
    skip = skips[0] if len(skips) == 1 else skips
    return skip_linear(x, skip, weight, None if len(bias) == 1 else bias) + 0 * bias.sum()


def outputs(inputs: list[Tensor], function=forward) -> list[Tensor]:
    """y, dx, dweight, dbias and the skips' gradients."""
    return common.outputs(function, inputs[:-1], inputs[-1:])


def check(actual: list[Tensor], inputs: list[Tensor]) -> None:
    def reference(x: Tensor, weight: Tensor, bias: Tensor, *skips: Tensor) -> Tensor:
        y = skip_linear_reference(x, skips, weight)
        return y + (0 if len(bias) == 1 else 1) * bias

    expected = outputs([t.double() for t in inputs], reference)
    assert all(t.dtype == inputs[0].dtype for t in actual)
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        rounding = torch.finfo(a.dtype).eps
        atol = 1e-5 * max(1.0, float(e.abs().max()))
        torch.testing.assert_close(a.double(), e, rtol=max(1e-5, rounding), atol=atol)


# ----------------------------------------------------------------------------------- reference


def test_reference_is_the_linear_layer_of_the_concatenation():
    torch.manual_seed(0)
    linear = torch.nn.Linear(24, 5)
    x, first, second = torch.randn(3, 2, 7, 8)
    y = skip_linear_reference(x, [first, second], linear.weight, linear.bias)
    torch.testing.assert_close(y, linear(torch.cat([x, first, second], dim=-1)))


def test_two_folded_projections():
    torch.manual_seed(0)
    x, first, second = torch.randn(3, 2, 7, 8)
    a, b = torch.nn.Linear(16, 8), torch.nn.Linear(16, 8)
    chain = skip_linear(skip_linear(x, first, a.weight, a.bias), second, b.weight, b.bias)
    of_x, of_skip = b.weight.chunk(2, dim=1)
    weight = torch.cat([of_x @ a.weight, of_skip], dim=1)
    folded = skip_linear(x, [first, second], weight, of_x @ a.bias + b.bias)
    torch.testing.assert_close(folded, chain)


def test_reference_passes_gradcheck():
    gen = torch.Generator().manual_seed(0)
    sizes = [(2, 3, 4), (5, 12), (5,), (2, 3, 4), (2, 3, 4)]
    inputs = [torch.randn(s, generator=gen, dtype=torch.float64, requires_grad=True) for s in sizes]
    assert torch.autograd.gradcheck(
        lambda x, weight, bias, *skips: skip_linear_reference(x, skips, weight, bias), inputs
    )


@pytest.mark.parametrize("case", CASES)
def test_operation(case: str):
    inputs = make(*CASES[case])
    check(outputs(inputs), inputs)


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_the_operation(case: str, monkeypatch):
    """Those that accompany the kernel, over a reference in its place."""
    monkeypatch.setattr(operation, "_kernel_may_serve", lambda x: True)
    inputs = make(*CASES[case])
    check(outputs(inputs), inputs)


def test_no_tokens():
    y, *grads = outputs(make("float32", (2, 0, 8, 4, 1), "contiguous"))
    assert y.shape == (2, 0, 4)
    assert not any(grad.any() for grad in grads)


# -------------------------------------------------------------------------------------- kernel


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> dict[str, list[Tensor]]:
    """What the kernels give for every case, and for one sample of a batch on its own."""
    return common.interpreted(__file__, tmp_path_factory.mktemp("interpreted"))


@needs_triton
@pytest.mark.parametrize("case", CASES)
def test_interpreted_kernel(case: str, interpreted):
    check(interpreted[case], make(*CASES[case]))


@needs_triton
def test_a_sample_does_not_depend_on_its_batch(interpreted):
    assert torch.equal(interpreted["alone"][0], interpreted[BATCH][0][1:2])


@pytest.fixture(scope="module")
def usage(tmp_path_factory) -> dict[str, dict[str, int]]:
    return common.compiled(__file__, tmp_path_factory.mktemp("compiled"))


@needs_triton
def test_compiles_without_spills(usage, record_property):
    common.check_spills(usage, 2 * len(TARGETS), record_property)
    assert all(used["SHARED"] <= 99 * 1024 for used in usage.values())


@on_cuda
@pytest.mark.parametrize(
    "case", [*CASES.values(), ("bfloat16", (2, 257, 1024, 1024, 1), "strided")]
)
def test_kernel_on_cuda(case: tuple[str, tuple[int, ...], str]):
    inputs = [t.cuda() for t in make(*case)]
    check(outputs(inputs), inputs)


# -------------------------------------------------------------------------------- registration


def test_opcheck():
    x, weight, bias, *skips, _ = make("float32", FOLDED, "strided")
    leaves = [t.detach().requires_grad_() for t in (x, *skips, weight, bias)]
    torch.library.opcheck(operation._skip_linear, (leaves[0], leaves[1:-2], *leaves[-2:]))


def test_compiles_into_one_graph(monkeypatch):
    monkeypatch.setattr(operation, "_kernel_may_serve", lambda x: True)
    inputs = make("float32", FOLDED, "contiguous")
    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True)
    for actual, eager in zip(outputs(inputs, compiled), outputs(inputs), strict=True):
        torch.testing.assert_close(actual, eager)


GOOD = {
    "x": torch.zeros(2, 3, 4),
    "skip": torch.zeros(2, 3, 4),
    "weight": torch.zeros(5, 8),
    "bias": torch.zeros(5),
}


@pytest.mark.parametrize(
    ("bad", "error", "says"),
    [
        ({"x": torch.zeros(3, 4)}, ValueError, r"x has shape \(3, 4\), expected \(B, N, D\)"),
        ({"x": torch.zeros(2, 3, 4).double()}, TypeError, "float64, expected float32"),
        ({"skip": torch.zeros(2, 3, 5)}, ValueError, r"skip has shape \(2, 3, 5\), expected"),
        ({"skip": []}, ValueError, "expected at least one"),
        ({"skip": [torch.zeros(2, 3, 4)] * 2}, ValueError, r"expected \(OUT, 12\) for x"),
        ({"skip": [torch.zeros(2, 3, 4), None]}, TypeError, "skip 1 is a NoneType"),
        ({"skip": torch.zeros(2, 3, 4).half()}, TypeError, "skip is torch.float16 and x is"),
        ({"weight": torch.zeros(8)}, ValueError, r"weight has shape \(8,\)"),
        ({"weight": torch.zeros(5, 8).bfloat16()}, TypeError, "weight is torch.bfloat16"),
        ({"weight": torch.zeros(5, 8, device="meta")}, ValueError, "weight is on meta"),
        ({"bias": torch.zeros(8)}, ValueError, r"bias has shape \(8,\).*= \(5,\) from weight"),
        ({"bias": 0.0}, TypeError, "bias is a float"),
    ],
)
def test_bad_input(bad: dict, error: type[Exception], says: str):
    with pytest.raises(error, match=says):
        skip_linear(**GOOD | bad)


# ------------------------------------------------------------------------------- as a script

BATCH = "bfloat16-2x9x16x24x3-strided"


def interpret() -> dict[str, list[Tensor]]:
    found = {case: outputs(make(*spec)) for case, spec in CASES.items()}
    x, weight, bias, *skips, _ = make(*CASES[BATCH])
    found["alone"] = [skip_linear(x[1:], [s[1:] for s in skips], weight, bias)]
    return found


def compile_all() -> dict[str, dict[str, int]]:
    usage = {}
    for sources in (2, 5):
        constants = operation.TILE | {"SOURCES": sources, "HAS_BIAS": True, "WIDEN": False}
        launch = [(f"{sources} sources", operation._forward_kernel, constants, operation.WARPS)]
        types = {
            "sources": ("*bf16",) * sources,
            "strides_b": ("i32",) * sources,
            "strides_n": ("i32",) * sources,
        }
        dtypes = itertools.product(["bf16"], TARGETS)
        usage |= common.compile_all(launch, dtypes, types, stages=operation.STAGES)
    return usage


if __name__ == "__main__":
    common.main(interpret, compile_all)
