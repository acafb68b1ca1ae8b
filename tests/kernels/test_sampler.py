"""guided_step against diffusers' schedulers and float64: interpreted kernel, registration."""

import math

import common
import pytest
import torch
from common import COMPILED, DTYPES, needs_triton, on_cuda
from torch import Tensor

from accelkit_kernels import (
    ddim_coefficients,
    ddpm_coefficients,
    dpmpp_coefficients,
    guided_step,
    guided_step_reference,
    sampler,
)

# dtype, shape, what is given beside the two predictions: everything over more than one block; the
# noise alone; nothing.
CASES = {
    "-".join([dtype, "x".join(map(str, shape)), *extras]): (dtype, shape, extras)
    for dtype, shape, extras in [
        ("float32", (2, 4, 17, 19), ("noise", "previous", "variance")),
        ("bfloat16", (2, 4, 17, 19), ("noise", "previous", "variance")),
        ("float16", (3, 3, 5), ("noise",)),
        ("float32", (1, 1), ()),
    ]
}


def make(dtype: str, shape: tuple[int, ...], extras: tuple[str, ...]) -> dict:
    """Halves of a batch and of the channels, as a model returns them, and a row per sample."""
    gen = torch.Generator().manual_seed(sum(shape))
    b, c, *rest = shape

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=gen).to(DTYPES[dtype])

    out = normal(2 * b, 2 * c, *rest)
    cond, uncond = out[:, :c].chunk(2)
    beside = {"noise": normal(*shape), "previous": normal(*shape), "variance": out[:b, c:].tanh()}
    step = ddpm_coefficients(0.3, 0.5, "learned_range", guidance=3.0, x0_limit=1.5)
    rows = [step._replace(from_previous=0.1 * i, guidance=2.0 + i).tensor() for i in range(b)]
    given = {"eps_cond": cond, "eps_uncond": uncond, "x": normal(*shape)}
    given |= {"coefficients": torch.stack(rows), "guided_channels": c - 1, "return_x0": True}
    return given | {name: beside[name] for name in extras}


def check(actual: tuple[Tensor, Tensor], case: str) -> None:
    given = make(*CASES[case])
    dtype = given["x"].dtype
    wide = {
        n: t.double() if isinstance(t, Tensor) and n != "coefficients" else t
        for n, t in given.items()
    }
    assert all(t.dtype == dtype for t in actual)
    common.check(actual, guided_step_reference(**wide), "sample x0")


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------- diffusers' schedulers

SHAPE, STEPS, GUIDANCE = (2, 3, 4, 5), 6, 2.5


def predictions() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(0)
    cond, uncond, x, noise = torch.randn(4, *SHAPE, generator=gen)
    return cond, uncond, x, noise


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(("eta", "limit"), [(0.0, math.inf), (1.0, 1.0)])
def test_ddim(prediction: str, eta: float, limit: float):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(prediction_type=prediction, clip_sample=limit == 1.0)
    theirs.set_timesteps(STEPS)
    cond, uncond, x, noise = predictions()
    eps = uncond + GUIDANCE * (cond - uncond)
    abar = theirs.alphas_cumprod.double().tolist()
    for t in theirs.timesteps.tolist():
        after = t - 1000 // STEPS
        coefficients = ddim_coefficients(
            abar[t], abar[after] if after >= 0 else 1.0, eta, GUIDANCE, prediction, limit
        )
        expected = theirs.step(eps, t, x, eta, variance_noise=noise if eta else None)
        new, x0 = guided_step(cond, uncond, x, coefficients, noise if eta else None, return_x0=True)
        close(new, expected.prev_sample)
        close(x0, expected.pred_original_sample)
        x = expected.prev_sample


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_ddpm(variance: str):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(variance_type=variance)  # limits x0 to -1 ... 1
    theirs.set_timesteps(STEPS)
    cond, uncond, x, _ = predictions()
    eps = uncond + GUIDANCE * (cond - uncond)
    abar = theirs.alphas_cumprod.double().tolist()
    learned = torch.rand(SHAPE) * 2 - 1 if variance == "learned_range" else None
    output = eps if learned is None else torch.cat([eps, learned], dim=1)
    for t in theirs.timesteps.tolist():
        after = int(theirs.previous_timestep(t))
        coefficients = ddpm_coefficients(
            abar[t], abar[after] if after >= 0 else 1.0, variance, GUIDANCE, x0_limit=1.0
        )
        expected = theirs.step(output, t, x, generator=torch.Generator().manual_seed(t)).prev_sample
        noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(t))
        new, x0 = guided_step(cond, uncond, x, coefficients, noise, variance=learned)
        assert x0 is None
        close(new, expected)
        x = expected


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
def test_dpm_solver(algorithm: str):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DPMSolverMultistepScheduler(algorithm_type=algorithm)
    theirs.set_timesteps(STEPS)
    cond, uncond, x, noise = predictions()
    eps = uncond + GUIDANCE * (cond - uncond)
    abar = (1 / (1 + theirs.sigmas.double() ** 2)).tolist()  # its sigmas are noise over signal
    stochastic, previous = algorithm.startswith("sde"), None
    for i, t in enumerate(theirs.timesteps):
        before = abar[i - 1] if i else None
        coefficients = dpmpp_coefficients(abar[i], abar[i + 1], before, stochastic, GUIDANCE)
        expected = theirs.step(eps, t, x, variance_noise=noise).prev_sample
        new, previous = guided_step(cond, uncond, x, coefficients, noise, previous, return_x0=True)
        close(new, expected)
        x = expected


def test_guidance_of_the_first_channels():
    cond, uncond, x, _ = predictions()
    noise_only = ddim_coefficients(0.5, 0.5)._replace(guidance=3.0, from_x0=0.0, from_eps=1.0)
    new, _ = guided_step(cond, uncond, x, noise_only, guided_channels=2)
    close(new[:, :2], (uncond + 3 * (cond - uncond))[:, :2])
    assert torch.equal(new[:, 2:], cond[:, 2:])


# ------------------------------------------------------------------------- reference and kernel


@pytest.mark.parametrize("case", CASES)
def test_operation(case: str):
    check(guided_step(**make(*CASES[case])), case)


def test_gradients_are_the_reference_s():
    given = {"eps_cond": 0, "eps_uncond": 1, "x": 2, "noise": 3}
    tensors = [t[..., :2].double().requires_grad_() for t in predictions()]
    step = ddim_coefficients(0.3, 0.5, eta=0.5, guidance=2.0)
    assert torch.autograd.gradcheck(
        lambda *t: guided_step_reference(*t[:3], step.tensor(), t[3]).sample, tensors
    )
    singles = {name: tensors[i].detach().float().requires_grad_() for name, i in given.items()}
    new, _ = guided_step(**singles, coefficients=step)
    assert new.requires_grad
    with torch.no_grad():
        assert torch.equal(new, guided_step(**singles, coefficients=step).sample)


def test_no_samples():
    x = torch.zeros(0, 3, 4)
    assert guided_step(x, None, x, ddim_coefficients(0.3, 0.5)).sample.shape == x.shape


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> dict[str, tuple[Tensor, Tensor]]:
    """What the kernel gives for every case, and for one sample of a batch on its own."""
    return common.interpreted(__file__, tmp_path_factory.mktemp("interpreted"))


@needs_triton
@pytest.mark.parametrize("case", CASES)
def test_interpreted_kernel(case: str, interpreted):
    check(interpreted[case], case)


@needs_triton
def test_a_sample_does_not_depend_on_its_batch(interpreted):
    for alone, batch in zip(interpreted["alone"], interpreted[BATCH], strict=True):
        assert torch.equal(alone[0], batch[1])


@needs_triton
def test_compiles_without_spills(tmp_path, record_property):
    usage = common.compiled(__file__, tmp_path)
    common.check_spills(usage, len(COMPILED), record_property)


@on_cuda
@pytest.mark.parametrize("case", CASES)
def test_kernel_on_cuda(case: str):
    given = make(*CASES[case])
    cuda = {n: t.cuda() if isinstance(t, Tensor) else t for n, t in given.items()}
    check(tuple(t.cpu() for t in guided_step(**cuda)), case)


# -------------------------------------------------------------------------------- registration


def test_opcheck():
    given = make("float32", (2, 3, 4), ("noise", "previous", "variance"))
    names = "eps_cond eps_uncond x coefficients noise previous variance guided_channels return_x0"
    arguments = [given[name] for name in names.split()]
    torch.library.opcheck(sampler._guided_step, (*arguments,))
    torch.library.opcheck(sampler._guided_step, (*arguments[:4], None, None, None, 3, False))


def test_compiles_into_one_graph():
    given = make("float32", (2, 3, 4), ("noise",))
    compiled = torch.compile(guided_step, backend="aot_eager", fullgraph=True)
    for actual, eager in zip(compiled(**given), guided_step(**given), strict=True):
        assert torch.equal(actual, eager)


X, STEP = torch.zeros(2, 3, 4), ddim_coefficients(0.3, 0.5)
GOOD = {"eps_cond": X, "eps_uncond": X, "x": X, "coefficients": STEP}


@pytest.mark.parametrize(
    ("bad", "error", "says"),
    [
        ({"x": torch.zeros(3)}, ValueError, r"x has shape \(3,\), expected \(B, C, ...\)"),
        ({"x": X.double()}, TypeError, "float64, expected float32"),
        ({"eps_cond": X[:, :2]}, ValueError, r"eps_cond has shape \(2, 2, 4\)"),
        ({"eps_uncond": X.half()}, TypeError, "eps_uncond is torch.float16 and x is"),
        ({"noise": X.to("meta")}, ValueError, "noise is on meta"),
        ({"coefficients": torch.zeros(9)}, ValueError, r"expected \(10,\) or \(B, 10\), B = 2"),
        ({"coefficients": torch.zeros(10).half()}, TypeError, "coefficients is torch.float16"),
        ({"coefficients": STEP._replace(noise=1.0)}, ValueError, "use noise, which is not given"),
        ({"coefficients": STEP._replace(from_previous=1.0)}, ValueError, "use previous, which"),
        ({"coefficients": STEP._replace(guidance=2.0), "eps_uncond": None}, ValueError, "is 2.0"),
        ({"variance": X}, ValueError, "variance is given and noise is not"),
        ({"guided_channels": 4}, ValueError, "guided_channels is 4, expected 0 to 3"),
        ({"eps_cond": None}, TypeError, "eps_cond is a NoneType"),
    ],
)
def test_bad_input(bad: dict, error: type[Exception], says: str):
    with pytest.raises(error, match=says):
        guided_step(**GOOD | bad)


def test_bad_coefficients():
    with pytest.raises(ValueError, match=r"abar is 1.0 and abar_next is 0.5, expected them in"):
        ddim_coefficients(1.0, 0.5)
    with pytest.raises(ValueError, match="prediction is 'noise', expected one of epsilon, sample"):
        dpmpp_coefficients(0.3, 0.5, prediction="noise")
    with pytest.raises(ValueError, match="variance is 'learned', expected fixed_small"):
        ddpm_coefficients(0.3, 0.5, "learned")


# ------------------------------------------------------------------------------- as a script

BATCH = next(iter(CASES))


def interpret() -> dict[str, list[Tensor]]:
    found = {case: list(guided_step(**make(*spec))) for case, spec in CASES.items()}
    alone = {n: t[1:] if isinstance(t, Tensor) else t for n, t in make(*CASES[BATCH]).items()}
    return found | {"alone": list(guided_step(**alone))}


def compile_all() -> dict[str, dict[str, int]]:
    flags = dict.fromkeys(["UNCOND", "NOISE", "PREVIOUS", "VARIANCE", "X0"], True)
    launch = ("all", sampler._kernel, flags | {"BLOCK": sampler.BLOCK}, sampler.WARPS)
    return common.compile_all([launch], COMPILED, {"coefficients_ptr": "*fp32"})


if __name__ == "__main__":
    common.main(interpret, compile_all)
