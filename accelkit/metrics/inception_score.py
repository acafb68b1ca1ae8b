"""The Inception Score, by running sums."""

from __future__ import annotations

import numpy as np
from scipy.special import xlogy

from accelkit.errors import AccelkitError
from accelkit.metrics.rows import Batches, TooFewError, parts

SPLITS = 10


def inception_score(batches: Batches, n: int) -> tuple[float, float]:
    """Return the mean and the deviation (divisor 10) of the score over ten equal runs of images.

    The score of a run is ``exp(mean_x KL(p(y|x) || p(y)))``, p(y) being the mean over the run: 1
    for probabilities that are all alike, the number of classes for certain and balanced ones. The
    runs are of consecutive images, as in the paper's code and in ADM's suite, which for 50,000
    images has the same ten.

    Args:
        batches: give "probabilities", (n, K), each row summing to 1.
        n: images there are, at least 10.

    Raises:
        TooFewError: if there are fewer than 10.
        AccelkitError: if a row is no distribution.

    Source: Salimans et al., "Improved Techniques for Training GANs" (2016), section 4.
    """
    if n < SPLITS:
        raise TooFewError(f"an Inception Score takes at least {SPLITS} images, got {n}")
    sizes = np.zeros(SPLITS)
    negentropy = np.zeros(SPLITS)  # sum over images and classes of p log p
    totals: list[np.ndarray | float] = [0.0] * SPLITS  # sum over images of p
    for split, rows in parts(batches, "probabilities", n, SPLITS):
        p = rows.astype(np.float64)
        if not (p >= 0).all() or np.abs(p.sum(axis=1) - 1).max() > 1e-3:
            raise AccelkitError(
                "rows of probabilities do not sum to 1; the extractor gives something else"
            )
        sizes[split] += len(p)
        negentropy[split] += xlogy(p, p).sum()
        totals[split] = totals[split] + p.sum(axis=0)
    marginal = np.stack([total / size for total, size in zip(totals, sizes, strict=True)])
    scores = np.exp(negentropy / sizes - xlogy(marginal, marginal).sum(axis=1))
    return float(scores.mean()), float(scores.std())
