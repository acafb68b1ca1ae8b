"""The Inception Score, from running sums."""

from __future__ import annotations

import numpy as np
from scipy.special import xlogy

from accelkit.errors import AccelkitError
from accelkit.metrics.rows import Batches, TooFewError, parts

SPLIT_IMAGES = 5000


def inception_score(batches: Batches, n: int, period: int = 1) -> tuple[float, float | None]:
    """Return the mean and the deviation (divisor their number) of the score over runs of images.

    There is a run for every 5,000 images, at least one, as in ADM's suite: ten for 50,000 images,
    as in the paper, and one below 10,000, which has no deviation. Shorter runs would have lower
    scores, since a mean over few images is close to each of them.

    The score of a run is ``exp(mean_x KL(p(y|x) || p(y)))``, p(y) being the mean over the run: 1
    for equal probabilities, the number of classes for certain and balanced ones. As in the paper's
    code and in ADM's suite, the images of a run are consecutive. Runs are cut between rounds of the
    labels, and there are no more runs than rounds.

    Args:
        batches: the rows "probabilities", (n, K), each summing to 1.
        n: number of images, at least 2.
        period: number of images after which the labels repeat.

    Raises:
        TooFewError: there are fewer than 2 images.
        AccelkitError: a row is not a distribution.

    Source: Salimans et al., "Improved Techniques for Training GANs" (2016), section 4.
    """
    if n < 2:
        raise TooFewError(f"an Inception Score takes at least 2 images, got {n}")
    splits = max(1, min(n // SPLIT_IMAGES, n // period))
    sizes = np.zeros(splits)
    negentropy = np.zeros(splits)  # sum over images and classes of p log p
    totals: list[np.ndarray | float] = [0.0] * splits  # sum over images of p
    for split, rows in parts(batches, "probabilities", n, splits, period):
        p = rows.astype(np.float64)
        if not (p >= 0).all() or np.abs(p.sum(axis=1) - 1).max() > 1e-3:
            raise AccelkitError(
                "rows of probabilities do not sum to 1; use an extractor that gives distributions"
            )
        sizes[split] += len(p)
        negentropy[split] += xlogy(p, p).sum()
        totals[split] = totals[split] + p.sum(axis=0)
    marginal = np.stack([total / size for total, size in zip(totals, sizes, strict=True)])
    scores = np.exp(negentropy / sizes - xlogy(marginal, marginal).sum(axis=1))
    return float(scores.mean()), float(scores.std()) if splits > 1 else None
