"""All quality figures of a set of generated images, and whether those of two sets differ."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from accelkit.errors import AccelkitError, AccelkitWarning
from accelkit.metrics.frechet import Gaussian, Moments
from accelkit.metrics.inception_score import inception_score
from accelkit.metrics.kid import kid
from accelkit.metrics.manifold import manifold_metrics
from accelkit.metrics.references import Reference
from accelkit.metrics.rows import Batches, TooFewError, blocks, dealt, drawn, shapes

MANIFOLD_IMAGES = 10_000
_CONFIDENCE = 0.95
_FID = ("fid", "fid_stderr", "fid_jackknife", "sfid")
_SCORE = ("inception_score", "inception_score_std")
_KID = ("kid", "kid_std")
_MANIFOLD = ("precision", "recall", "density", "coverage", "manifold_images")


def measure(
    batches: Batches,
    reference: Reference,
    *,
    groups: int = 10,
    period: int = 1,
    nearest: int = 3,
    manifold_images: int = MANIFOLD_IMAGES,
    seed: int = 0,
    missing: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return the quality figures of generated images; those that cannot be computed are null.

    Memory holds only a few numbers for each image, and the figures do not depend on how the rows
    are cut into batches.

    The FID's standard error is from the jackknife: the FID is computed again without each of at
    most ``groups`` equal groups of images. Labels repeat in rounds of the classes, and image i is
    in group ``(i // period) % groups``, so that every group has all classes; without some of the
    classes the FID would differ, whatever the seeds. There are fewer groups if there are fewer
    rounds, or if more than a tenth of the images would be in no group. The error shows how much the
    FID would change with other seeds. It does not include the bias of few images, which all rows of
    a table share.

    Precision, recall, density and coverage compare equal numbers of images: the size of the smaller
    set, at most ``manifold_images``, drawn from the larger by ``seed`` because folders are sorted
    by class. ADM's suite compares 50,000 generated images with 10,000 real ones.

    Args:
        batches: the images' features in order: "pooled", (n, d), and if the extractor has them
            "spatial" and "probabilities".
        reference: features of real images from the same extractor.
        groups: largest number of groups of the jackknife, at least 2.
        period: number of images after which the labels repeat: the number of classes if
            ``label = i % classes``, 1 for images without labels.
        nearest: k of the four manifold figures.
        manifold_images: most images on either side for these figures.
        seed: seed of the subsets, in [0, 2^32).
        missing: reasons for rows without "spatial" or "probabilities", from the extractor.

    Returns:
        Plain data: images, fid, fid_stderr, fid_jackknife (the FID without each group), sfid,
        inception_score, inception_score_std (over a run for every 5,000 images, null for one), kid,
        kid_std, precision, recall, density, coverage, manifold_images, and missing, the reason for
        each figure that is null.

    Raises:
        AccelkitError: there are no images, or their features do not match the reference's.
    """
    if groups < 2:
        raise AccelkitError(f"the jackknife takes at least 2 groups, got {groups}")
    if period < 1:
        raise AccelkitError(f"labels repeat after at least 1 image, got a period of {period}")
    found = shapes(batches)
    n, width = found.get("pooled", (0, 0))
    if n == 0:
        raise AccelkitError("there are no generated images to measure; give at least one")
    if width != len(reference.pooled.mean):
        raise AccelkitError(
            f"the generated images' features are {width} wide, the reference's "
            f"{len(reference.pooled.mean)}; use one extractor for both"
        )
    why = {
        "spatial": "the extractor gives no spatial features",
        "probabilities": "the extractor gives no probabilities",
        **(missing or {}),
    }
    names = (*_FID, *_SCORE, *_KID, *_MANIFOLD)
    out: dict[str, Any] = {"images": n, "missing": {}, **dict.fromkeys(names)}
    _frechet(out, batches, reference, (groups, period), found, why["spatial"])
    _warn_if_few(out, reference, found)
    if "probabilities" in found:
        _score(out, batches, period)
    else:
        out["missing"].update(dict.fromkeys(_SCORE, why["probabilities"]))
    _of_real_images(out, batches, reference, nearest, manifold_images, seed)
    _leave_out_what_overflowed(out)
    return out


def distinguishable(row_a: Mapping[str, Any], row_b: Mapping[str, Any]) -> bool:
    """Return whether the FIDs of two rows differ at 95% confidence, by the paired jackknife.

    Rows of one table share labels and seeds, so the groups left out are the same and common noise
    cancels in the differences. False if either row has no jackknife.

    Args:
        row_a: figures of :func:`measure`.
        row_b: likewise, of the same number of images and groups.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 11; Student's t
    with one degree of freedom fewer than groups.
    """
    a, b = row_a["fid_jackknife"], row_b["fid_jackknife"]
    if not a or not b or len(a) != len(b) or row_a["images"] != row_b["images"]:
        return False
    error = jackknife_error(np.subtract(a, b))
    bound = stats.t.ppf((1 + _CONFIDENCE) / 2, len(a) - 1)
    return bool(abs(row_a["fid"] - row_b["fid"]) > bound * error)


def jackknife_error(values: Sequence[float] | np.ndarray) -> float:
    """Return the standard error from the values without each of g equal groups.

    ``sqrt((g - 1) / g * sum (v_i - mean)^2)``. Source: Efron and Tibshirani (1993), eq. 11.5.
    """
    return float(np.sqrt((len(values) - 1) * np.var(values)))


def _frechet(
    out: dict[str, Any],
    batches: Batches,
    reference: Reference,
    jackknife: tuple[int, int],
    found: dict[str, tuple[int, int]],
    no_spatial: str,
) -> None:
    """Fill in FID, its jackknife of (groups, period), and sFID."""
    n, reasons = out["images"], out["missing"]
    if n < 2:
        reasons.update(dict.fromkeys(_FID, "a covariance takes 2 images"))
        return
    groups, reason = _groups(n, *jackknife)
    moments = [Moments() for _ in range(groups + 1)]  # the last is for images in no group
    for group, rows in dealt(batches, "pooled", n, groups, jackknife[1]):
        moments[group].update(rows)
    out["fid"] = _distance(moments, reference.pooled)
    if reason:
        reasons.update(dict.fromkeys(_FID[1:3], reason))
    else:
        out["fid_jackknife"] = [
            _distance(moments[:g] + moments[g + 1 :], reference.pooled) for g in range(groups)
        ]
        out["fid_stderr"] = jackknife_error(out["fid_jackknife"])
    del moments
    if "spatial" not in found:
        reasons["sfid"] = no_spatial
    elif reference.spatial is None:
        reasons["sfid"] = "the reference holds no statistics of spatial features"
    else:
        spatial = Moments()
        for rows in blocks(batches, "spatial"):
            spatial.update(rows)
        out["sfid"] = _distance([spatial], reference.spatial)


def _groups(n: int, most: int, period: int) -> tuple[int, str]:
    """Return the number of the jackknife's groups, and the reason if there is only one."""
    if n < 2 * most:
        return 1, f"{most} groups of at least 2 take more than {n} images"
    rounds = n // period
    if rounds < 2:
        return 1, (
            f"{n:,} images hold only {rounds} whole rounds of {period:,} classes; a standard error "
            f"takes at least 2, {2 * period:,} images"
        )
    for groups in range(min(most, rounds), 1, -1):
        if 10 * (n % (groups * period)) <= n:
            return groups, ""
    return 1, (
        f"{n:,} images hold only {rounds} whole rounds of {period:,} classes and a part of one; a "
        f"standard error takes whole ones, {rounds * period:,} or {(rounds + 1) * period:,} images"
    )


def _score(out: dict[str, Any], batches: Batches, period: int) -> None:
    """Fill in the Inception Score."""
    n, reasons = out["images"], out["missing"]
    try:
        out["inception_score"], out["inception_score_std"] = inception_score(batches, n, period)
    except TooFewError as error:
        reasons.update(dict.fromkeys(_SCORE, str(error)))
        return
    if out["inception_score_std"] is None:
        reasons["inception_score_std"] = (
            f"{n:,} images make one run; a deviation takes two, of at least 5,000 images and a "
            "round of the classes each"
        )


def _of_real_images(
    out: dict[str, Any],
    batches: Batches,
    reference: Reference,
    nearest: int,
    manifold_images: int,
    seed: int,
) -> None:
    """Fill in KID and the manifold figures, which need rows of real images."""
    n, reasons = out["images"], out["missing"]
    if reference.batches is None or reference.n is None:
        reason = "the reference holds statistics alone, and no images"
        reasons.update(dict.fromkeys([*_KID, *_MANIFOLD], reason))
        return
    try:
        with np.errstate(
            over="ignore", invalid="ignore"
        ):  # figures that overflow are left out below
            out["kid"], out["kid_std"] = kid(batches, n, reference.batches, reference.n, seed)
    except TooFewError as error:
        reasons.update(dict.fromkeys(_KID, str(error)))
    size = min(n, reference.n, manifold_images)
    try:
        chosen = drawn(n, size, seed, 0), drawn(reference.n, size, seed, 1)
        out.update(manifold_metrics(batches, reference.batches, *chosen, nearest))
        out["manifold_images"] = size
    except TooFewError as error:
        reasons.update(dict.fromkeys(_MANIFOLD, str(error)))


def _distance(moments: list[Moments], reference: Gaussian) -> float:
    together = Moments()
    for part in moments:
        together.merge(part)
    return Gaussian.of(together.mean, together.cov).distance(reference)


def _leave_out_what_overflowed(out: dict[str, Any]) -> None:
    for name, value in out.items():
        if name != "missing" and value is not None and not np.isfinite(value).all():
            out[name] = None
            out["missing"][name] = "the features are too large to compute with"


def _warn_if_few(
    out: dict[str, Any], reference: Reference, found: dict[str, tuple[int, int]]
) -> None:
    sides = [("the generated", out["images"])]
    if (
        reference.kind == "images" and reference.n is not None
    ):  # statistics describe a whole data set
        sides.append(("the reference's", reference.n))
    short = []
    for side, n in sides:
        names = [
            f"the {found[rows][1]:,} dimensions of {name}'s features"
            for name, rows in (("fid", "pooled"), ("sfid", "spatial"))
            if out[name] is not None and n <= found[rows][1]
        ]
        if names:
            short.append(f"{side} {n:,} images are too few for {' and '.join(names)}")
    if short:
        warnings.warn(
            f"{', '.join(short)}: compare rows of one table with equal N, not published figures",
            AccelkitWarning,
            stacklevel=3,
        )
