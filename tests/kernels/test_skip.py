"""skip_linear against float64: reference, interpreted kernel, registration."""

import itertools

import common
import pytest
import torch
from common import DTYPES, TARGETS, needs_compiler, needs_triton, on_cuda
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
    """Return x, weight, bias and the skips, from a fixed seed."""
    b, n, d, out, k = size
    gen = torch.Generator().manual_seed(sum(size))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen).to(DTYPES[dtype])

    if layout == "contiguous":
        x, *skips = (normal(b, n, d) for _ in range(k + 1))
        weight = normal(out, (k + 1) * d)
    else:  # strided features, patches after extra tokens, a part of a wider weight
        x = normal(b, d, n).transpose(1, 2)
        skips = [normal(b, n + 2, d)[:, 2:] for _ in range(k)]
        weight = normal(out, (k + 2) * d)[:, d:]
    return [x, weight / d**0.5, normal(out), *skips]


def forward(x: Tensor, weight: Tensor, bias: Tensor, *skips: Tensor) -> Tensor:
    skip = skips[0] if len(skips) == 1 else skips
    return skip_linear(x, skip, weight, None if len(bias) == 1 else bias)


def check(actual: Tensor, inputs: list[Tensor]) -> None:
    x, weight, bias, *skips = (t.double() for t in inputs)
    expected = skip_linear_reference(x, skips, weight, None if len(bias) == 1 else bias)
    assert actual.dtype == inputs[0].dtype
    common.check([actual], [expected], "y")


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


def test_gradients_are_those_of_the_reference():
    inputs = [t.double().requires_grad_() for t in make("float32", (2, 3, 4, 5, 2), "contiguous")]
    assert torch.autograd.gradcheck(
        lambda x, weight, bias, *skips: skip_linear_reference(x, skips, weight, bias), inputs
    )
    leaves = [t.detach().float().requires_grad_() for t in inputs]
    y = forward(*leaves)
    assert y.requires_grad
    with torch.no_grad():
        assert torch.equal(y, forward(*leaves))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("operation_runs", [False, True], ids=["reference", "operation"])
def test_operation(case: str, operation_runs: bool, monkeypatch):
    monkeypatch.setattr(operation, "_kernel_may_serve", lambda x: operation_runs)
    inputs = make(*CASES[case])
    check(forward(*inputs), inputs)


def test_no_tokens():
    assert forward(*make("float32", (2, 0, 8, 4, 1), "contiguous")).shape == (2, 0, 4)


# -------------------------------------------------------------------------------------- kernel


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> dict[str, Tensor]:
    """What the kernel returns for every case, and for one sample of a batch alone."""
    return common.interpreted(__file__, tmp_path_factory.mktemp("interpreted"))


@needs_triton
@pytest.mark.parametrize("case", CASES)
def test_interpreted_kernel(case: str, interpreted):
    check(interpreted[case], make(*CASES[case]))


@needs_triton
def test_a_sample_does_not_depend_on_its_batch(interpreted):
    assert torch.equal(interpreted["alone"], interpreted[BATCH][1:2])


@needs_compiler
def test_compiles_without_spills(record_property):
    usage = compile_all()
    common.check_spills(usage, 2 * len(TARGETS), record_property)
    assert all(used["SHARED"] <= 99 * 1024 for used in usage.values())


@on_cuda
@pytest.mark.parametrize(
    "case", [*CASES.values(), ("bfloat16", (2, 257, 1024, 1024, 1), "strided")]
)
def test_kernel_on_cuda(case: tuple[str, tuple[int, ...], str]):
    inputs = [t.cuda() for t in make(*case)]
    check(forward(*inputs), inputs)


# -------------------------------------------------------------------------------- registration


def test_opcheck():
    x, weight, bias, *skips = make("float32", FOLDED, "strided")
    torch.library.opcheck(operation._skip_linear, (x, skips, weight, bias))


def test_compiles_into_one_graph(monkeypatch):
    monkeypatch.setattr(operation, "_kernel_may_serve", lambda x: True)
    inputs = make("float32", FOLDED, "contiguous")
    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), forward(*inputs))


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


def interpret() -> dict[str, Tensor]:
    found = {case: forward(*make(*spec)) for case, spec in CASES.items()}
    x, weight, bias, *skips = make(*CASES[BATCH])
    return found | {"alone": skip_linear(x[1:], [s[1:] for s in skips], weight, bias)}


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
    common.main(interpret)
