"""Classifier-free guidance and the sampler's update in one pass over the sample, noise given.

    eps  = u + w (c - u)                                 Ho & Salimans 2022, eq. 6, as DiT has it
    x0   = p x + q eps, kept within +-limit
    next = a x + b x0 + e eps + f x0' + s exp(r v) z

for the predictions with (c) and without (u) the condition, x0' of the step before, noise z, and the
model's variance output v. The coefficients depend on the noise levels alone; coefficients.py gives
those of DDIM, DDPM and DPM-Solver++. They are read from memory, so that one CUDA graph serves every
step.
"""
# ruff: noqa: N803  (the sizes of a formula, and Triton's compile-time arguments, keep their case)

from typing import NamedTuple

import torch
from torch import Tensor

from accelkit_kernels import _common
from accelkit_kernels._common import HAS_TRITON, run
from accelkit_kernels.coefficients import StepCoefficients

__all__ = ["GuidedStep", "guided_step", "guided_step_reference"]

COUNT = len(StepCoefficients._fields)


class GuidedStep(NamedTuple):
    """A sampler's step: the next sample, and the data it predicted, None unless asked for."""

    sample: Tensor
    x0: Tensor | None


# ---------------------------------------------------------------------------- PyTorch reference


def guided_step_reference(
    eps_cond: Tensor,
    eps_uncond: Tensor | None,
    x: Tensor,
    coefficients: Tensor,
    noise: Tensor | None = None,
    previous: Tensor | None = None,
    variance: Tensor | None = None,
    guided_channels: int | None = None,
    return_x0: bool = False,
) -> GuidedStep:
    """What `guided_step` computes, in plain PyTorch; float64 is taken too, and kept."""
    wide = torch.promote_types(x.dtype, torch.float32)
    columns = coefficients.to(wide).reshape(-1, COUNT, *[1] * (x.ndim - 1))  # (1 or B, 10, ...)
    guidance, of_x, of_eps, limit, *by, std, spread = columns.unbind(1)
    eps, old = eps_cond.to(wide), x.to(wide)
    if eps_uncond is not None:
        without = eps_uncond.to(wide)
        first = x.shape[1] if guided_channels is None else guided_channels
        guided = without + guidance * (eps - without)
        eps = torch.cat([guided[:, :first], eps[:, first:]], dim=1)
    x0 = (of_x * old + of_eps * eps).clamp(-limit, limit)
    new = by[0] * old + by[1] * x0 + by[2] * eps
    if previous is not None:
        new = new + by[3] * previous.to(wide)
    if noise is not None:
        if variance is not None:
            std = std * (spread * variance.to(wide)).exp()
        new = new + std * noise.to(wide)
    return GuidedStep(new.to(x.dtype), x0.to(x.dtype) if return_x0 else None)


# ------------------------------------------------------------------------------- Triton kernel

BLOCK, WARPS = 1024, 4  # eight elements a thread: the 16 bytes of one vector load in bfloat16

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _kernel(
        next_ptr, x0_ptr, cond_ptr, uncond_ptr, x_ptr, noise_ptr, previous_ptr, variance_ptr,
        coefficients_ptr, E, guided, coefficients_b,
        cond_b, uncond_b, x_b, noise_b, previous_b, variance_b,
        UNCOND: tl.constexpr, NOISE: tl.constexpr, PREVIOUS: tl.constexpr, VARIANCE: tl.constexpr,
        X0: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One program per BLOCK of the E elements of a sample, of which `guided` are guided."""
        blocks = tl.cdiv(E, BLOCK)
        b = (tl.program_id(0) // blocks).to(tl.int64)
        at = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
        mask = at < E
        k = coefficients_ptr + b * coefficients_b  # in the order of StepCoefficients

        eps = tl.load(cond_ptr + b * cond_b + at, mask).to(tl.float32)
        x = tl.load(x_ptr + b * x_b + at, mask).to(tl.float32)
        if UNCOND:
            without = tl.load(uncond_ptr + b * uncond_b + at, mask).to(tl.float32)
            eps = tl.where(at < guided, without + tl.load(k) * (eps - without), eps)
        limit = tl.load(k + 3)
        x0 = tl.load(k + 1) * x + tl.load(k + 2) * eps
        x0 = tl.where(x0 > limit, limit, tl.where(x0 < -limit, -limit, x0))  # a NaN stays one
        new = tl.load(k + 4) * x + tl.load(k + 5) * x0 + tl.load(k + 6) * eps
        if PREVIOUS:
            previous = tl.load(previous_ptr + b * previous_b + at, mask).to(tl.float32)
            new += tl.load(k + 7) * previous
        if NOISE:
            std = tl.load(k + 8)
            if VARIANCE:
                variance = tl.load(variance_ptr + b * variance_b + at, mask).to(tl.float32)
                std = std * tl.exp(tl.load(k + 9) * variance)
            new += std * tl.load(noise_ptr + b * noise_b + at, mask).to(tl.float32)
        tl.store(next_ptr + b * E + at, new.to(next_ptr.dtype.element_ty), mask)
        if X0:
            tl.store(x0_ptr + b * E + at, x0.to(x0_ptr.dtype.element_ty), mask)


def _rows(t: Tensor) -> Tensor:
    """`t` with each sample contiguous: halves of a batch and of the channels are, as they come."""
    return t if t[:1].is_contiguous() else t.contiguous()


def _triton(
    x: Tensor,
    eps_cond: Tensor,
    eps_uncond: Tensor | None,
    coefficients: Tensor,
    noise: Tensor | None,
    previous: Tensor | None,
    variance: Tensor | None,
    guided_channels: int,
    return_x0: bool,
) -> GuidedStep:
    given = (eps_cond, eps_uncond, x, noise, previous, variance)
    rows = [_rows(x if t is None else t) for t in given]
    new = x.new_empty(x.shape)
    x0 = x.new_empty(x.shape) if return_x0 else None
    coefficients = coefficients.contiguous()
    B, E = x.shape[0], x[0].numel()
    with torch.cuda.device_of(x):
        _kernel[(B * triton.cdiv(E, BLOCK),)](
            new, new if x0 is None else x0, *rows, coefficients,
            E, guided_channels * x[0, 0].numel(), COUNT if coefficients.ndim == 2 else 0,
            *(t.stride(0) for t in rows),
            UNCOND=eps_uncond is not None, NOISE=noise is not None,
            PREVIOUS=previous is not None, VARIANCE=variance is not None, X0=return_x0,
            BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return GuidedStep(new, x0)


def _plain(
    x: Tensor, eps_cond: Tensor, eps_uncond: Tensor | None, coefficients: Tensor, *rest: object
) -> GuidedStep:
    """The reference in the order of `_triton`."""
    return guided_step_reference(eps_cond, eps_uncond, x, coefficients, *rest)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------ public function


def guided_step(
    eps_cond: Tensor,
    eps_uncond: Tensor | None,
    x: Tensor,
    coefficients: Tensor | StepCoefficients,
    noise: Tensor | None = None,
    previous: Tensor | None = None,
    variance: Tensor | None = None,
    guided_channels: int | None = None,
    return_x0: bool = False,
) -> GuidedStep:
    """Guide a model's predictions and take one step of a sampler.

    Runs the Triton kernel on CUDA tensors, and the PyTorch reference elsewhere and where gradients
    are recorded. `torch.compile` keeps it whole.

    Args:
        eps_cond: the prediction with the condition (B, C, ...), float32, bfloat16 or float16, of
            noise or of what else the coefficients are for. Any strides; a chunk of the batch or
            of the channels is read in place.
        eps_uncond: the one without, like `x`; None for no guidance.
        x: the sample (B, C, ...), as are all others.
        coefficients: float32 (10,), or (B, 10) with a row per sample, on the device of `x`, in the
            order of `StepCoefficients`; or these themselves, which are then copied to the device.
        noise: standard normal, for steps that add some.
        previous: the x0 that the step before returned, for steps of second order.
        variance: the model's variance output, from -1 to 1, where the noise depends on it.
        guided_channels: how many channels are guided, the first ones; the rest keep `eps_cond`, as
            in DiT's own sampler, which guides 3 of 4. None for all.
        return_x0: whether to return the predicted data too, which steps of second order need.

    Returns:
        The next sample and the predicted data or None, each (B, C, ...), contiguous, in the dtype
        of `x`; computed in float32.

    Raises:
        ValueError: a shape or device does not fit; `variance` without `noise`; or coefficients that
            use a tensor which is not given.
        TypeError: an input is no tensor, its dtype is not one of the three, or the dtypes differ.

    Source: see coefficients.py.
    """
    given = {"eps_cond": eps_cond, "eps_uncond": eps_uncond, "x": x}
    given |= {"noise": noise, "previous": previous, "variance": variance}
    tensors = {n: t for n, t in given.items() if t is not None or n in ("eps_cond", "x")}
    _common.check_tensors(**tensors)
    if isinstance(coefficients, StepCoefficients):
        _check_used(coefficients, tensors)
        coefficients = coefficients.tensor(x.device)
    _common.check_tensors(coefficients=coefficients)
    channels = (x.shape[1] if x.ndim > 1 else 0) if guided_channels is None else guided_channels
    rest = (noise, previous, variance, channels, return_x0)
    _check(eps_cond, eps_uncond, x, coefficients, *rest)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors.values() if t is not None):
        return guided_step_reference(eps_cond, eps_uncond, x, coefficients, *rest)
    new, x0 = _guided_step(eps_cond, eps_uncond, x, coefficients, *rest)
    return GuidedStep(new, x0 if return_x0 else None)


def _check_used(coefficients: StepCoefficients, tensors: dict[str, Tensor | None]) -> None:
    for name, value in [
        ("noise", coefficients.noise),
        ("previous", coefficients.from_previous),
        ("variance", coefficients.noise and coefficients.spread),
    ]:
        if value != 0 and name not in tensors:
            raise ValueError(f"these coefficients use {name}, which is not given")
    if coefficients.guidance != 1 and "eps_uncond" not in tensors:
        raise ValueError(f"guidance is {coefficients.guidance} and eps_uncond is not given")


def _check(
    eps_cond: Tensor,
    eps_uncond: Tensor | None,
    x: Tensor,
    coefficients: Tensor,
    noise: Tensor | None,
    previous: Tensor | None,
    variance: Tensor | None,
    guided_channels: int,
    return_x0: bool,
) -> None:
    if x.ndim < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (B, C, ...)")
    _common.check_dtype("x", x)
    others = {"eps_cond": eps_cond, "eps_uncond": eps_uncond, "noise": noise}
    others |= {"previous": previous, "variance": variance}
    _common.check_beside(others, x, "(B, C, ...)", x.shape)
    if coefficients.shape not in ((COUNT,), (x.shape[0], COUNT)):
        given = f"coefficients has shape {tuple(coefficients.shape)}"
        raise ValueError(f"{given}, expected ({COUNT},) or (B, {COUNT}), B = {x.shape[0]}")
    if coefficients.dtype != torch.float32:
        raise TypeError(f"coefficients is {coefficients.dtype}, expected float32")
    if coefficients.device != x.device:
        where = f"coefficients is on {coefficients.device} and x on {x.device}"
        raise ValueError(f"{where}: move it to x's device")
    if variance is not None and noise is None:
        raise ValueError("variance is given and noise is not: it is the noise's")
    if not 0 <= guided_channels <= x.shape[1]:
        raise ValueError(f"guided_channels is {guided_channels}, expected 0 to {x.shape[1]}")


@torch.library.custom_op("accelkit::guided_step", mutates_args=())
def _guided_step(
    eps_cond: Tensor,
    eps_uncond: Tensor | None,
    x: Tensor,
    coefficients: Tensor,
    noise: Tensor | None,
    previous: Tensor | None,
    variance: Tensor | None,
    guided_channels: int,
    return_x0: bool,
) -> tuple[Tensor, Tensor]:
    rest = (noise, previous, variance, guided_channels, return_x0)
    _check(eps_cond, eps_uncond, x, coefficients, *rest)
    new, x0 = run("guided_step", _triton, _plain, x, eps_cond, eps_uncond, coefficients, *rest)
    return new.contiguous(), x.new_empty(0) if x0 is None else x0.contiguous()


@_guided_step.register_fake
def _(
    eps_cond: Tensor,
    eps_uncond: Tensor | None,
    x: Tensor,
    coefficients: Tensor,
    noise: Tensor | None,
    previous: Tensor | None,
    variance: Tensor | None,
    guided_channels: int,
    return_x0: bool,
) -> tuple[Tensor, Tensor]:
    rest = (noise, previous, variance, guided_channels, return_x0)
    _check(eps_cond, eps_uncond, x, coefficients, *rest)
    return x.new_empty(x.shape), x.new_empty(x.shape if return_x0 else 0)
