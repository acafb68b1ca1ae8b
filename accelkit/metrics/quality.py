"""All quality figures of one set of generated images, and whether two sets can be told apart."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from accelkit.errors import AccelkitError, AccelkitWarning
from accelkit.metrics.frechet import Gaussian, Moments
from accelkit.metrics.inception_score import inception_score
from accelkit.metrics.kid import kid
from accelkit.metrics.manifold import manifold_metrics
from accelkit.metrics.references import Reference
from accelkit.metrics.rows import Batches, TooFewError, blocks, drawn, parts, shapes

MANIFOLD_IMAGES = 10_000
_CONFIDENCE = 0.95
_MANIFOLD = ("precision", "recall", "density", "coverage")


def measure(
    batches: Batches,
    reference: Reference,
    *,
    groups: int = 10,
    nearest: int = 3,
    manifold_images: int = MANIFOLD_IMAGES,
    seed: int = 0,
    missing: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return the quality figures of generated images, null where they cannot be had.

    Memory does not grow with the number of images but for a few numbers an image, and the figures
    do not depend on how the rows are cut into batches.

    The FID's standard error is by the jackknife: the FID is taken again without each of ``groups``
    equal runs of consecutive images. Labels go round the classes, so that every run has all of
    them; every tenth image of ten classes would be of one. It tells how much the FID would change
    with other seeds, and nothing of the bias for few images, which all rows of a table share.

    Precision, recall, density and coverage compare equal numbers of images: as many as the smaller
    set has, at most ``manifold_images``, drawn from the larger by ``seed`` because folders are
    sorted by class. ADM's suite takes 50,000 generated against 10,000 real ones.

    Args:
        batches: the images' features in order: "pooled", (n, d), and where the extractor gives them
            "spatial" and "probabilities".
        reference: of the same extractor.
        groups: of the jackknife, at least 2.
        nearest: k of the four manifold figures.
        manifold_images: most images on either side for these.
        seed: of the subsets drawn, in [0, 2^32).
        missing: why rows have no "spatial" or "probabilities", as the extractor says.

    Returns:
        Plain data: images, fid, fid_stderr, fid_jackknife (the FID without each group), sfid,
        inception_score, inception_score_std, kid, kid_std, precision, recall, density, coverage,
        manifold_images, and missing, a sentence for each figure that is null.

    Raises:
        AccelkitError: there are no images, or their features are not the reference's.
    """
    if groups < 2:
        raise AccelkitError(f"the jackknife takes at least 2 groups, got {groups}")
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
    out: dict[str, Any] = {"images": n, "missing": {}}

    def leave_out(names: Iterable[str], reason: str) -> None:
        out["missing"].update(dict.fromkeys(names, reason))

    _frechet(out, batches, reference, groups, found, why["spatial"])
    _warn_if_few(out, found)

    out.update(inception_score=None, inception_score_std=None)
    if "probabilities" not in found:
        leave_out(["inception_score"], why["probabilities"])
    else:
        try:
            out["inception_score"], out["inception_score_std"] = inception_score(batches, n)
        except TooFewError as error:
            leave_out(["inception_score"], str(error))

    out.update(dict.fromkeys(["kid", "kid_std", *_MANIFOLD, "manifold_images"]))
    if reference.batches is None or reference.n is None:
        leave_out(["kid", *_MANIFOLD], "the reference holds statistics alone, and no images")
        return out
    try:
        out["kid"], out["kid_std"] = kid(batches, n, reference.batches, reference.n, seed)
    except TooFewError as error:
        leave_out(["kid"], str(error))
    size = min(n, reference.n, manifold_images)
    try:
        chosen = drawn(n, size, seed, 0), drawn(reference.n, size, seed, 1)
        out.update(manifold_metrics(batches, reference.batches, *chosen, nearest))
        out["manifold_images"] = size
    except TooFewError as error:
        leave_out(_MANIFOLD, str(error))
    return out


def distinguishable(row_a: Mapping[str, Any], row_b: Mapping[str, Any]) -> bool:
    """Whether the FIDs of two rows differ at 95% confidence, by the paired jackknife.

    Rows of one table share labels and seeds, so the groups left out are the same and what both
    have in common cancels in the differences. False where either has no jackknife.

    Args:
        row_a: of :func:`measure`.
        row_b: likewise, of as many images in as many groups.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 11; Student's t
    with one degree of freedom less than groups.
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
    groups: int,
    found: dict[str, tuple[int, int]],
    no_spatial: str,
) -> None:
    """Fill in FID, its jackknife and sFID."""
    n = out["images"]
    reasons = out["missing"]
    out.update(fid=None, fid_stderr=None, fid_jackknife=None, sfid=None)
    if n < 2:
        reasons.update(dict.fromkeys(["fid", "fid_stderr", "sfid"], "a covariance takes 2 images"))
        return
    moments = [Moments() for _ in range(groups)]
    for group, rows in parts(batches, "pooled", n, groups):
        moments[group].update(rows)
    out["fid"] = _distance(moments, reference.pooled)
    if n < 2 * groups:
        reasons["fid_stderr"] = f"{groups} groups of at least 2 take more than {n} images"
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


def _distance(moments: list[Moments], reference: Gaussian) -> float:
    together = Moments()
    for part in moments:
        together.merge(part)
    return Gaussian.of(together.mean, together.cov).distance(reference)


def _warn_if_few(out: dict[str, Any], found: dict[str, tuple[int, int]]) -> None:
    n = out["images"]
    short = [
        f"the {found[rows][1]:,} dimensions of {name}'s features"
        for name, rows in (("fid", "pooled"), ("sfid", "spatial"))
        if out[name] is not None and n <= found[rows][1]
    ]
    if short:
        warnings.warn(
            f"{n:,} images are too few for {' and '.join(short)}: rows of one table of equal N "
            "may be compared, not with published figures",
            AccelkitWarning,
            stacklevel=3,
        )
