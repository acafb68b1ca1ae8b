"""qk_norm_rope against float64: reference, interpreted kernel, gradients, registration."""

import itertools

import common
import pytest
import torch
from common import COMPILED, DTYPES, needs_compiler, needs_triton, on_cuda
from torch import Tensor

from accelkit_kernels import _common, qk_norm_rope, qk_norm_rope_reference, rotary, rotary_2d

# (B, rows, columns, H, d), dtype, layout: one token of one pair of pairs; the odd head width of
# DiT-XL over more than one tile; few heads, with different positions for each sample.
CASES = {
    "-".join([dtype, "x".join(map(str, size)), layout]): (dtype, size, layout)
    for dtype, size, layout in [
        ("float32", (1, 1, 1, 1, 4), "contiguous"),
        ("float32", (2, 3, 5, 3, 72), "strided"),
        ("bfloat16", (2, 3, 5, 3, 72), "contiguous"),
        ("float16", (3, 2, 2, 2, 12), "strided"),
    ]
}


def make(dtype: str, size: tuple[int, ...], layout: str) -> list[Tensor]:
    """Return q, k, the gradients of both, cos and sin, from a fixed seed."""
    b, rows, columns, h, d = size
    n = rows * columns
    gen = torch.Generator().manual_seed(sum(size))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen).to(DTYPES[dtype])

    cos, sin = rotary_2d(rows, columns, d)
    if layout == "contiguous":
        q, k, dq, dk = (normal(b, n, h, d) for _ in range(4))
    else:  # one projection to q, k and v; gradients as from attention; other positions
        q, k, _ = normal(b, n, 3, h, d).unbind(2)
        dq, dk = normal(2, b, h, n, d).transpose(2, 3)
        turns = torch.arange(b)[:, None]
        cos, sin = (torch.stack([t.roll(int(i), 0) for i in turns]) for t in (cos, sin))
    return [q + 1, k * 3, dq, dk, cos, sin]


def outputs(inputs: list[Tensor], function=qk_norm_rope) -> list[Tensor]:
    """Return q, k, dq, dk."""
    *tensors, cos, sin = inputs
    return common.outputs(lambda q, k: function(q, k, cos, sin), tensors[:2], tensors[2:])


def check(actual: list[Tensor], inputs: list[Tensor]) -> None:
    expected = outputs([t.double() for t in inputs], qk_norm_rope_reference)
    assert all(t.dtype == inputs[0].dtype for t in actual)
    common.check(actual, expected, "q k dq dk")


# ----------------------------------------------------------------------------------- reference


def test_rotation_by_complex_numbers():
    """Turn pairs as complex numbers, by products; the row's half comes first."""
    rows, columns, d = 3, 2, 8
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, rows * columns, 3, d, dtype=torch.float64)
    out, _ = qk_norm_rope_reference(q, k, *rotary_2d(rows, columns, d), eps=1e-12)
    normed = (q - q.mean(-1, keepdim=True)) / q.std(-1, keepdim=True, correction=0)
    for row, column in itertools.product(range(rows), range(columns)):
        for j in range(d // 2):
            place, power = (row, j) if j < d // 4 else (column, j - d // 4)
            angle = torch.tensor(place * 10_000.0 ** (-2 * power / (d // 2)), dtype=torch.float64)
            token = row * columns + column
            pair = torch.view_as_complex(normed[:, token, :, 2 * j : 2 * j + 2].contiguous())
            turned = torch.view_as_real(pair * torch.polar(torch.ones_like(angle), angle))
            torch.testing.assert_close(
                out[:, token, :, 2 * j : 2 * j + 2], turned, rtol=1e-6, atol=1e-6
            )


def test_attention_sees_relative_positions_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8)
    cos, sin = rotary_2d(6, 7, 8)

    def product(at: tuple[int, int], other: tuple[int, int]) -> Tensor:
        tables = [t[[row * 7 + column]] for t in (cos, sin) for row, column in (at, other)]
        here, _ = qk_norm_rope_reference(q, k, tables[0], tables[2])
        _, there = qk_norm_rope_reference(q, k, tables[1], tables[3])
        return (here * there).sum()

    torch.testing.assert_close(product((0, 1), (3, 2)), product((2, 5), (5, 6)))


def test_reference_passes_gradcheck():
    gen = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 2, 2, 4, generator=gen, dtype=torch.float64).requires_grad_()
    cos, sin = rotary_2d(1, 2, 4)
    assert torch.autograd.gradcheck(lambda q, k: qk_norm_rope_reference(q, k, cos, sin), (q, k))


@pytest.mark.parametrize("case", CASES)
def test_operation(case: str):
    inputs = make(*CASES[case])
    check(outputs(inputs), inputs)


def test_no_tokens():
    q = torch.zeros(2, 0, 3, 8)
    assert [t.shape for t in qk_norm_rope(q, q, *torch.zeros(2, 0, 4))] == [q.shape, q.shape]


# -------------------------------------------------------------------------------------- kernel


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> dict[str, list[Tensor]]:
    """What the kernels return for every case, and for one sample of a batch alone."""
    return common.interpreted(__file__, tmp_path_factory.mktemp("interpreted"))


@needs_triton
@pytest.mark.parametrize("case", CASES)
def test_interpreted_kernel(case: str, interpreted):
    check(interpreted[case], make(*CASES[case]))


@needs_triton
def test_a_sample_does_not_depend_on_its_batch(interpreted):
    for alone, batch in zip(interpreted["alone"], interpreted[BATCH], strict=True):
        assert torch.equal(alone[0], batch[1])


@needs_compiler
def test_compiles_without_spills(record_property):
    usage = compile_all()
    common.check_spills(usage, 2 * len(COMPILED), record_property)


@on_cuda
@pytest.mark.parametrize("case", [*CASES.values(), ("bfloat16", (2, 16, 16, 16, 72), "strided")])
def test_kernel_on_cuda(case: tuple[str, tuple[int, ...], str]):
    inputs = [t.cuda() for t in make(*case)]
    assert _common.kernel_serves(inputs[0], rotary.MAX_WIDTH)
    check(outputs(inputs), inputs)


# -------------------------------------------------------------------------------- registration


def test_opcheck():
    q, k, dq, dk, cos, sin = make("float32", (2, 2, 2, 2, 8), "strided")
    torch.library.opcheck(rotary._qk_norm_rope_backward, (dq, dk, q, k, cos, sin, 1e-6))
    leaves = [t.detach().requires_grad_() for t in (q, k)]
    torch.library.opcheck(rotary._qk_norm_rope, (*leaves, cos, sin, 1e-6))


def test_compiles_into_one_graph():
    inputs = make("float32", (2, 2, 2, 2, 8), "strided")
    compiled = torch.compile(qk_norm_rope, backend="aot_eager", fullgraph=True)
    for actual, eager in zip(outputs(inputs, compiled), outputs(inputs), strict=True):
        assert torch.equal(actual, eager)


Q, TABLE = torch.zeros(2, 3, 4, 8), torch.zeros(3, 4)
GOOD = {"q": Q, "k": Q, "cos": TABLE, "sin": TABLE}


@pytest.mark.parametrize(
    ("bad", "error", "says"),
    [
        ({"q": Q[0]}, ValueError, r"q has shape \(3, 4, 8\), expected \(B, N, H, d\)"),
        ({"q": Q[..., :7], "k": Q[..., :7]}, ValueError, "with d even"),
        ({"q": Q.double()}, TypeError, "float64, expected float32"),
        ({"k": Q[:, :, :2]}, ValueError, r"k has shape \(2, 3, 2, 8\)"),
        ({"k": Q.half()}, TypeError, "k is torch.float16 and q is"),
        ({"k": Q.to("meta")}, ValueError, "k is on meta"),
        ({"cos": torch.zeros(3, 8)}, ValueError, r"cos has shape \(3, 8\), expected \(3, 4\) or"),
        ({"sin": TABLE.half()}, TypeError, "sin is torch.float16, expected float32"),
        ({"sin": TABLE.to("meta")}, ValueError, "sin is on meta"),
        ({"cos": None}, TypeError, "cos is a NoneType"),
        ({"eps": 0.0}, ValueError, "eps is 0.0"),
    ],
)
def test_bad_input(bad: dict, error: type[Exception], says: str):
    with pytest.raises(error, match=says):
        qk_norm_rope(**GOOD | bad)


def test_bad_grid():
    with pytest.raises(ValueError, match="head_dim is 6, expected a multiple of 4"):
        rotary_2d(2, 2, 6)
    with pytest.raises(ValueError, match="the grid is 0 x 2"):
        rotary_2d(0, 2, 8)


# ------------------------------------------------------------------------------- as a script

BATCH = "float32-2x3x5x3x72-strided"


def interpret() -> dict[str, list[Tensor]]:
    found = {case: outputs(make(*spec)) for case, spec in CASES.items()}
    found["alone"] = outputs([t[1:2] for t in make(*CASES[BATCH])])
    return found


def compile_all() -> dict[str, dict[str, int]]:
    launches = []
    width, rows = rotary._tile(72)
    for backward in (False, True):
        constants = {"WIDTH": width, "ROWS": rows, "BACKWARD": backward, "H": 16, "D": 72}
        constants |= dict.fromkeys(["q_h", "k_h", "dq_h", "dk_h"], 72)
        launches.append(("backward" if backward else "forward", rotary._kernel, constants, 4))
    tables = {"cos_ptr": "*fp32", "sin_ptr": "*fp32"}
    return common.compile_all(launches, COMPILED, tables)


if __name__ == "__main__":
    common.main(interpret)
