"""Feature rows in batches of uneven size, and references made from rows."""

import numpy as np

from accelkit.metrics.frechet import Gaussian
from accelkit.metrics.references import Reference


def batches_of(sizes=(7, 1, 64, 333), **rows):
    """Return a function that yields the rows in batches of these sizes, over and over."""
    rows = {name: np.asarray(r) for name, r in rows.items()}

    def batches():
        start = turn = 0
        while start < len(next(iter(rows.values()))):
            size = sizes[turn % len(sizes)]
            yield {name: r[start : start + size] for name, r in rows.items()}
            start, turn = start + size, turn + 1

    return batches


def gaussian_of(rows):
    return Gaussian.of(rows.mean(axis=0), np.cov(rows.T).reshape(rows.shape[1], -1))


def reference_of(pooled, spatial=None):
    return Reference(
        "rows",
        "0" * 64,
        "images",
        len(pooled),
        gaussian_of(pooled),
        None if spatial is None else gaussian_of(spatial),
        batches_of(pooled=pooled),
    )
