"""bias_gelu_tanh, bias_geglu and bias_swiglu against PyTorch's activations in float64."""

import common
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from common import DTYPES, needs_compiler, needs_triton, on_cuda
from torch import Tensor

from accelkit_kernels import (
    _activation_kernels,
    _common,
    activations,
    bias_geglu,
    bias_geglu_reference,
    bias_gelu_tanh,
    bias_gelu_tanh_reference,
    bias_swiglu,
    bias_swiglu_reference,
)


def geglu_erf(*inputs: Tensor) -> Tensor:
    return bias_geglu(*inputs, approximate="none")


# For each form: the function, its formula in PyTorch, its inputs.
FORMS = {
    "gelu": (bias_gelu_tanh, lambda x, b: F.gelu(x + b, approximate="tanh"), "x bias"),
    "geglu": (
        bias_geglu,
        lambda x, v, b, c: F.gelu(x + b, approximate="tanh") * (v + c),
        "x value bias value_bias",
    ),
    "geglu_erf": (geglu_erf, lambda x, v, b, c: F.gelu(x + b) * (v + c), "x value bias value_bias"),
    "geglu_one_bias": (
        lambda x, v, c: bias_geglu(x, v, None, c),
        lambda x, v, c: F.gelu(x, approximate="tanh") * (v + c),
        "x value value_bias",
    ),
    "swiglu": (bias_swiglu, lambda x, v, b, c: F.silu(x + b) * (v + c), "x value bias value_bias"),
    "swiglu_plain": (bias_swiglu, lambda x, v: F.silu(x) * v, "x value"),
}
# One element, odd sizes over two chunks of rows, more than one block of features.
CASES = {
    "one": ("float32", (1, 1, 1), "contiguous"),
    "odd": ("float32", (3, 15, 7), "strided"),
    "wide": ("float32", (1, 2, 1152), "contiguous"),
    "bfloat16": ("bfloat16", (2, 33, 130), "strided"),
    "float16": ("float16", (2, 33, 130), "contiguous"),
}


def make(form: str, dtype: str, shape: tuple[int, int, int], layout: str) -> list[Tensor]:
    """Return the form's inputs and the gradient of the output, from a fixed seed."""
    b, n, f = shape
    gen = torch.Generator().manual_seed(b * 10_000 + n * 100 + f)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=gen).to(DTYPES[dtype])

    if layout == "contiguous":
        x, value, dout = 4 * normal(b, n, f), normal(b, n, f), normal(b, n, f)
        bias, value_bias = normal(f), normal(f)
    else:  # the halves of a projection, a slice of tokens, a column of a table
        value, x = (4 * normal(b, n, 2 * f)).chunk(2, -1)
        dout = normal(b, n + 2, f)[:, 1:-1]
        bias, value_bias = normal(f, 2).unbind(1)
    inputs = {"x": x, "value": value, "bias": bias, "value_bias": value_bias}
    return [*(inputs[name] for name in FORMS[form][2].split()), dout]


def outputs(form: str, inputs: list[Tensor], function=None) -> list[Tensor]:
    return common.outputs(function or FORMS[form][0], inputs[:-1], inputs[-1:])


def check(form: str, actual: list[Tensor], inputs: list[Tensor]) -> None:
    _, formula, names = FORMS[form]
    assert all(t.dtype == inputs[0].dtype for t in actual)
    common.check(actual, outputs(form, [t.double() for t in inputs], formula), f"out {names}")


# ----------------------------------------------------------------------------------- reference


@pytest.mark.parametrize(
    "reference", [bias_gelu_tanh_reference, bias_geglu_reference, bias_swiglu_reference]
)
def test_reference_passes_gradcheck(reference):
    form = "gelu" if reference is bias_gelu_tanh_reference else "geglu"
    *inputs, _ = make(form, "float32", (2, 3, 4), "contiguous")
    assert torch.autograd.gradcheck(reference, [t.double().requires_grad_() for t in inputs])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_operation(form: str, case: str):
    inputs = make(form, *CASES[case])
    check(form, outputs(form, inputs), inputs)


def test_no_rows():
    out, dx, dbias = outputs("gelu", make("gelu", "float32", (2, 0, 8), "contiguous"))
    assert out.shape == dx.shape == (2, 0, 8)
    assert not dbias.any()


# -------------------------------------------------------------------------------------- kernel


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> dict[str, list[Tensor]]:
    return common.interpreted(__file__, tmp_path_factory.mktemp("interpreted"))


@needs_triton
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_interpreted_kernel(form: str, case: str, interpreted):
    check(form, interpreted[f"{form} {case}"], make(form, *CASES[case]))


@needs_triton
def test_a_row_does_not_depend_on_its_batch(interpreted):
    for alone, batch in zip(interpreted["geglu alone"], interpreted["geglu odd"], strict=True):
        assert alone.ndim == 1 or torch.equal(alone[0], batch[1])


@needs_triton
def test_large_inputs_stay_finite(interpreted):
    """Check both tails, where the derivative is a saturated sigmoid's 0 times a large number."""
    for act in ("gelu", "geglu_erf", "swiglu_plain"):
        out, dx = interpreted[f"{act} large"][:2]
        sign = torch.tensor([[1e4, 0.0, 100.0, 0.0]])
        torch.testing.assert_close(out, sign)
        torch.testing.assert_close(dx, sign.sign())


@needs_compiler
def test_compiles_without_spills(record_property):
    usage = compile_all()
    common.check_spills(usage, 4 * len(common.BUILDS), record_property)


@on_cuda
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "case",
    [*CASES.values(), ("bfloat16", (2, 256, 4608), "strided")],
    ids=lambda c: f"{c[0]}{c[1]}",
)
def test_kernel_on_cuda(form: str, case: tuple[str, tuple[int, int, int], str]):
    inputs = [t.cuda() for t in make(form, *case)]
    check(form, outputs(form, inputs), inputs)


# -------------------------------------------------------------------------------- registration


def test_opcheck():
    x, value, bias, value_bias, dout = make("geglu", "float32", (2, 3, 8), "strided")
    inputs = [t.detach() for t in (x, bias, value, value_bias)]
    torch.library.opcheck(activations._bias_act_backward, (dout, *inputs, "gelu"))
    torch.library.opcheck(activations._bias_act_backward, (dout, x, None, value, None, "silu"))
    leaves = [t.requires_grad_() for t in inputs]
    torch.library.opcheck(activations._bias_act, (*leaves, "gelu"))
    torch.library.opcheck(activations._bias_act, (*leaves[:2], None, None, "gelu_tanh"))


GOOD = {name: torch.zeros(2, 3, 4) for name in ("gate", "value")}
GOOD |= {name: torch.zeros(4) for name in ("gate_bias", "value_bias")}


@pytest.mark.parametrize(
    ("bad", "error", "says"),
    [
        ({"gate": torch.zeros(4)}, ValueError, r"gate has shape \(4,\), expected \(..., F\)"),
        ({"gate": torch.zeros(2, 3, 4).double()}, TypeError, "gate is torch.float64, expected"),
        ({"value": torch.zeros(2, 3, 5)}, ValueError, r"value has shape \(2, 3, 5\).*from gate"),
        ({"value": torch.zeros(2, 3, 4).half()}, TypeError, "value is torch.float16 and gate is"),
        ({"value": None}, TypeError, "value is a NoneType"),
        ({"gate_bias": torch.zeros(1, 4)}, ValueError, r"gate_bias has shape \(1, 4\)"),
        ({"gate_bias": 0.0}, TypeError, "gate_bias is a float"),
        ({"value_bias": torch.zeros(4, device="meta")}, ValueError, "value_bias is on meta"),
        ({"approximate": "erf"}, ValueError, "approximate is 'erf', expected"),
    ],
)
def test_bad_input(bad: dict, error: type[Exception], says: str):
    with pytest.raises(error, match=says):
        bias_geglu(**GOOD | bad)
    if "approximate" not in bad:
        with pytest.raises(error, match=says):
            bias_swiglu(**GOOD | bad)


def test_bad_input_without_a_gate():
    with pytest.raises(ValueError, match=r"bias has shape \(3,\), expected \(F,\) = \(4,\) from x"):
        bias_gelu_tanh(torch.zeros(2, 4), torch.zeros(3))
    with pytest.raises(TypeError, match="bias is a NoneType"):
        bias_gelu_tanh(torch.zeros(2, 4), None)


# ------------------------------------------------------------------------------- as a script


def interpret() -> dict[str, list[Tensor]]:
    found = {
        f"{form} {case}": outputs(form, make(form, *spec))
        for form in FORMS
        for case, spec in CASES.items()
    }
    batch = make("geglu", *CASES["odd"])
    found["geglu alone"] = outputs("geglu", [t[1:2] if t.ndim == 3 else t for t in batch])
    x = torch.tensor([[1e4, -1e4, 100.0, -100.0]])
    one, zero = torch.ones_like(x), torch.zeros(4)
    found["gelu large"] = outputs("gelu", [x, zero, one])
    found["geglu_erf large"] = outputs("geglu_erf", [x, one, zero, zero, one])
    found["swiglu_plain large"] = outputs("swiglu_plain", [x, one, one])
    return found


def compile_all() -> dict[str, dict[str, int]]:
    block = {"WIDTH": _activation_kernels.WIDTH, "CHUNK": _common.CHUNK, "BIASED": True}
    launches = [
        (f"{act} {kernel.__name__}", kernel, block | gated | {"ACT": act}, 4)
        for act, gated in [
            ("gelu_tanh", {"GATED": False, "VALUE_BIASED": False}),
            ("gelu", {"GATED": True, "VALUE_BIASED": True}),  # the largest gated form
        ]
        for kernel in (_activation_kernels._forward_kernel, _activation_kernels._backward_kernel)
    ]
    return common.compile_all(launches, common.BUILDS)


if __name__ == "__main__":
    common.main(interpret)
