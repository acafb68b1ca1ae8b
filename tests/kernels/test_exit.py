"""exit_head against float64 and diffusers' DiT: reference, interpreted kernel, registration."""

import common
import pytest
import torch
from common import DTYPES, TARGETS, needs_compiler, needs_triton, on_cuda
from torch import Tensor

from accelkit_kernels import exit as operation
from accelkit_kernels import exit_head, exit_head_reference

# (B, rows, columns, D, patch, C, channels): one pixel; more than one tile of tokens and of
# features, not all channels; more outputs than a tile holds.
CASES = {
    "-".join([dtype, "x".join(map(str, size)), layout]): (dtype, size, layout)
    for dtype, size, layout in [
        ("float32", (1, 1, 1, 1, 1, 1, 1), "contiguous"),
        ("float32", (2, 5, 7, 150, 2, 3, 2), "strided"),
        ("bfloat16", (2, 5, 7, 150, 2, 3, 2), "contiguous"),
        ("float16", (1, 2, 3, 20, 4, 5, 5), "strided"),
    ]
}


def make(dtype: str, size: tuple[int, ...], layout: str) -> list[Tensor]:
    """Return x, shift, scale, weight and bias, from a fixed seed."""
    b, rows, columns, d, patch, every, _ = size
    n, outputs = rows * columns, patch * patch * every
    gen = torch.Generator().manual_seed(sum(size))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen).to(DTYPES[dtype])

    if layout == "contiguous":
        x, shift, scale = normal(b, n, d), normal(b, d), normal(b, d)
    else:  # patches after extra tokens, one projection to both vectors
        x = normal(b, n + 2, d)[:, 2:]
        shift, scale = normal(b, 2 * d).chunk(2, dim=1)
    # the offset exposes a variance that cancels
    return [x + 3, shift, scale, normal(outputs, d) / d**0.5, normal(outputs)]


def call(function, inputs: list[Tensor], size: tuple[int, ...]) -> Tensor:
    _, rows, columns, _, patch, _, channels = size
    return function(*inputs, (rows, columns), patch, channels)


def check(actual: Tensor, case: str) -> None:
    dtype, size, layout = CASES[case]
    expected = call(exit_head_reference, [t.double() for t in make(dtype, size, layout)], size)
    assert actual.dtype == DTYPES[dtype]
    assert actual.is_contiguous()
    # The modulated tokens are rounded before they are summed: some roundings of the largest output.
    rounding = max(3e-6, torch.finfo(actual.dtype).eps)
    atol = 4 * rounding * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(actual.double(), expected, rtol=rounding, atol=atol)


# ----------------------------------------------------------------------------------- reference


def test_end_of_a_dit():
    """Compare with the last lines of diffusers' model; a hook records the tokens of its blocks."""
    dit = pytest.importorskip("diffusers").DiTTransformer2DModel
    torch.manual_seed(0)
    model = dit(2, 8, in_channels=3, out_channels=5, num_layers=1, sample_size=8, patch_size=2)
    model = model.eval()
    seen = {}
    model.transformer_blocks[-1].register_forward_hook(lambda *a: seen.update(x=a[2]))
    model.proj_out_1.register_forward_hook(lambda *a: seen.update(vectors=a[2]))
    with torch.no_grad():
        out = model(
            torch.randn(2, 3, 8, 8),
            timestep=torch.tensor([3, 9]),
            class_labels=torch.tensor([0, 1]),
        ).sample
        shift, scale = seen["vectors"].chunk(2, dim=1)
        last = model.proj_out_2
        for channels in (None, 3):
            y = exit_head(seen["x"], shift, scale, last.weight, last.bias, (4, 4), 2, channels)
            torch.testing.assert_close(y, out[:, :channels])


def test_affine_norm_of_a_uvit():
    torch.manual_seed(0)
    norm = torch.nn.LayerNorm(12)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    last, x = torch.nn.Linear(12, 4 * 3), torch.randn(2, 8, 12)
    with torch.no_grad():
        shift, scale = norm.bias.expand(2, -1), (norm.weight - 1).expand(2, -1)
        y = exit_head(x[:, 2:], shift, scale, last.weight, last.bias, (2, 3), 2, eps=norm.eps)
        patches = last(norm(x))[:, 2:]
    expected = torch.einsum("bhwpqc->bchpwq", patches.view(2, 2, 3, 2, 2, 3)).reshape(2, 3, 4, 6)
    torch.testing.assert_close(y, expected)


def test_gradients_are_those_of_the_reference():
    gen = torch.Generator().manual_seed(0)
    sizes = [(2, 4, 3), (2, 3), (2, 3), (8, 3), (8,)]
    inputs = [torch.randn(s, generator=gen, dtype=torch.float64, requires_grad=True) for s in sizes]
    assert torch.autograd.gradcheck(lambda *t: exit_head_reference(*t, (2, 2), 2, 1), inputs)
    halves = [t.detach().float().requires_grad_() for t in inputs]
    y = exit_head(*halves, (2, 2), 2, 1)
    assert y.requires_grad
    with torch.no_grad():
        assert torch.equal(y, exit_head(*halves, (2, 2), 2, 1))


@pytest.mark.parametrize("case", CASES)
def test_operation(case: str):
    dtype, size, layout = CASES[case]
    check(call(exit_head, make(dtype, size, layout), size), case)


def test_no_samples():
    inputs = make("float32", (1, 2, 2, 8, 2, 3, 3), "contiguous")
    y = exit_head(*(t[:0] for t in inputs[:3]), inputs[3], None, (2, 2), 2)
    assert y.shape == (0, 3, 4, 4)


# -------------------------------------------------------------------------------------- kernel


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> dict[str, Tensor]:
    """What the kernel returns for every case, and for one sample of a batch alone."""
    return common.interpreted(__file__, tmp_path_factory.mktemp("interpreted"))


@needs_triton
@pytest.mark.parametrize("case", CASES)
def test_interpreted_kernel(case: str, interpreted):
    check(interpreted[case], case)


@needs_triton
def test_a_sample_does_not_depend_on_its_batch(interpreted):
    assert torch.equal(interpreted["alone"][0], interpreted[BATCH][1])


@needs_compiler
def test_compiles_without_spills(record_property):
    usage = compile_all()
    common.check_spills(usage, 3 * len(TARGETS), record_property)
    assert all(used["SHARED"] <= 99 * 1024 for used in usage.values())


@on_cuda
@pytest.mark.parametrize("case", CASES)
def test_kernel_on_cuda(case: str):
    dtype, size, layout = CASES[case]
    check(call(exit_head, [t.cuda() for t in make(dtype, size, layout)], size).cpu(), case)


# -------------------------------------------------------------------------------- registration


def test_opcheck():
    inputs = make("float32", (2, 2, 3, 8, 2, 3, 2), "strided")
    torch.library.opcheck(operation._exit_head, (*inputs, 2, 3, 2, 2, 1e-6))


def test_compiles_into_one_graph():
    inputs = make("float32", (2, 2, 3, 8, 2, 3, 2), "strided")
    compiled = torch.compile(exit_head, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*inputs, (2, 3), 2, 2), exit_head(*inputs, (2, 3), 2, 2))


GOOD = {
    "x": torch.zeros(2, 6, 4),
    "shift": torch.zeros(2, 4),
    "scale": torch.zeros(2, 4),
    "weight": torch.zeros(12, 4),
    "bias": torch.zeros(12),
    "grid": (2, 3),
    "patch": 2,
}


@pytest.mark.parametrize(
    ("bad", "error", "says"),
    [
        ({"x": torch.zeros(6, 4)}, ValueError, r"x has shape \(6, 4\), expected \(B, N, D\)"),
        ({"x": torch.zeros(2, 6, 4).double()}, TypeError, "float64, expected float32"),
        ({"scale": torch.zeros(2, 5)}, ValueError, r"scale has shape \(2, 5\)"),
        ({"grid": (2, 2)}, ValueError, "grid is 2 x 2, expected a grid of the 6 tokens of x"),
        ({"patch": 0}, ValueError, "patch is 0"),
        ({"weight": torch.zeros(10, 4)}, ValueError, r"weight has shape \(10, 4\), expected \(4 C"),
        ({"weight": torch.zeros(12, 4).half()}, TypeError, "weight is torch.float16 and x is"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias has shape \(3,\).*= \(12,\) from weight"),
        ({"bias": torch.zeros(12, device="meta")}, ValueError, "bias is on meta"),
        ({"channels": 4}, ValueError, "channels is 4, expected 1 to 3"),
        ({"eps": 0.0}, ValueError, "eps is 0.0"),
        ({"shift": [0.0]}, TypeError, "shift is a list"),
    ],
)
def test_bad_input(bad: dict, error: type[Exception], says: str):
    with pytest.raises(error, match=says):
        exit_head(**GOOD | bad)


# ------------------------------------------------------------------------------- as a script

BATCH = "float32-2x5x7x150x2x3x2-strided"


def interpret() -> dict[str, Tensor]:
    found = {case: call(exit_head, make(*spec), spec[1]) for case, spec in CASES.items()}
    inputs = [t[1:] if i < 3 else t for i, t in enumerate(make(*CASES[BATCH]))]
    return found | {"alone": call(exit_head, inputs, CASES[BATCH][1])}


def compile_all() -> dict[str, dict[str, int]]:
    """In float32 for every target too: its products are what spilled on some and not on others."""
    constants = {
        "HAS_BIAS": True,
        "WIDEN": False,
        "TOKENS": operation.TOKENS,
        "STEP": operation.STEP,
    }
    usage = {}
    for name, patch, channels in [("bf16", 2, 4), ("bf16", 4, 8), ("fp32", 4, 8)]:
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
        sizes = {"PATCH": patch, "ALL": 8, "CHANNELS": channels}
        sizes["OUTPUTS"] = operation._outputs(patch * patch * channels, dtype)
        label = f"{channels} channels"
        launch = (label, operation._forward_kernel, constants | sizes, operation.WARPS)
        builds = [(name, target) for target in TARGETS]
        usage |= common.compile_all([launch], builds, stages=operation.STAGES)
    return usage


if __name__ == "__main__":
    common.main(interpret)
