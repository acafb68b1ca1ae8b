"""layernorm_modulate against float64: reference, interpreted kernel, gradients, registration."""

import itertools

import common
import pytest
import torch
from common import DTYPES, LAYOUTS, needs_triton, on_cuda
from torch import Tensor

from accelkit_kernels import _common, adaln, layernorm_modulate, layernorm_modulate_reference

# One token of one feature, odd sizes, three chunks of tokens, the width of DiT-XL.
SHAPES = [(1, 1, 1), (3, 5, 7), (2, 70, 48), (1, 2, 1152)]
CASES = {
    "-".join([dtype, "x".join(map(str, shape)), layout]): (dtype, shape, layout)
    for dtype, shape, layout in itertools.product(DTYPES, SHAPES, LAYOUTS)
}


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
    return common.outputs(function, inputs[:-1], inputs[-1:])


def check(actual: list[Tensor], inputs: list[Tensor]) -> None:
    expected = outputs([t.double() for t in inputs], layernorm_modulate_reference)
    assert all(t.dtype == inputs[0].dtype for t in actual)
    common.check(actual, expected, "y dx dshift dscale")


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


BROKEN = """
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "triton":
            raise ImportError("libtriton.so: undefined symbol")
import sys
sys.meta_path.insert(0, Broken())
"""


@pytest.mark.parametrize(
    ("missing", "problem"),
    [
        ("import sys; sys.modules['triton'] = None", "Triton is not installed"),
        (BROKEN, "Triton cannot be imported (ImportError: libtriton.so: undefined symbol)"),
    ],
    ids=["missing", "broken"],
)
def test_runs_without_triton(missing, problem):
    code = f"""
{missing}
import torch
from accelkit_kernels import adaln, layernorm_modulate, layernorm_modulate_reference
assert not adaln._common.HAS_TRITON
assert adaln._common.TRITON_PROBLEM == {problem!r}
inputs = torch.randn(2, 3, 8), torch.randn(2, 8), torch.randn(2, 8)
assert torch.equal(layernorm_modulate(*inputs), layernorm_modulate_reference(*inputs))
"""
    common.run_python("-c", code, interpret=True)


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
    for alone, batch in zip(
        interpreted["alone"], interpreted["float32-2x70x48-contiguous"], strict=True
    ):
        assert torch.equal(alone[0], batch[1])


@pytest.fixture(scope="module")
def usage(tmp_path_factory) -> dict[str, dict[str, int]]:
    return common.compiled(__file__, tmp_path_factory.mktemp("compiled"))


@needs_triton
@pytest.mark.parametrize("kernel", ["forward", "backward", "sum"])
def test_compiles_without_spills(kernel: str, usage, record_property):
    mine = {k: v for k, v in usage.items() if k.startswith(f"{kernel} ")}
    expected = len(common.BUILDS) + (0 if kernel == "sum" else len(NARROW))
    common.check_spills(mine, expected, record_property)


@on_cuda
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
    assert _common.kernel_serves(inputs[0], adaln.MAX_WIDTH)
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


# A tile of many tokens, beside the one of DiT-XL that holds one.
NARROW = [("bf16", 80), ("fp32", 86)]


def interpret() -> dict[str, list[Tensor]]:
    inputs = {case: make(*spec) for case, spec in CASES.items()}
    inputs["alone"] = [t[1:2] for t in inputs["float32-2x70x48-contiguous"]]
    assert all(_common.kernel_serves(x, adaln.MAX_WIDTH) for x, *_ in inputs.values())
    return {case: outputs(tensors) for case, tensors in inputs.items()}


def compile_all() -> dict[str, dict[str, int]]:
    usage = {}
    for features, builds in ((1152, common.BUILDS), (64, NARROW)):
        width, tokens, warps = _common.tile(features)
        size = {"WIDTH": width, "TOKENS": tokens}
        launches = [
            (f"forward D={features}", adaln._forward_kernel, size, warps),
            (
                f"backward D={features}",
                adaln._backward_kernel,
                size | {"CHUNK": _common.CHUNK},
                warps,
            ),
        ]
        usage |= common.compile_all(launches, builds)
    launch = ("sum", _common._sum_kernel, {"WIDTH": 256, "COUNT": 2}, 4)
    return usage | common.compile_all([launch], common.BUILDS)


if __name__ == "__main__":
    common.main(interpret, compile_all)
