"""The Kernel Inception Distance over random subsets, a few of which are held at a time."""

from __future__ import annotations

import numpy as np

from accelkit.metrics.rows import Batches, TooFewError, drawn

SUBSETS = 100
SUBSET_IMAGES = 1000
_HELD = 10  # 82 MB a side of Inception features; each pass over the rows fills this many


def kid(
    generated: Batches, n_generated: int, reference: Batches, n_reference: int, seed: int = 0
) -> tuple[float, float]:
    """Return the mean and the deviation (divisor 100) of the unbiased MMD^2 over 100 subsets.

    A subset has 1,000 images a side, or half of the images if there are fewer than 2,000, so that
    subsets differ; the mean's expectation does not depend on the size. It may be below 0. Subsets
    are drawn at random, so that the order of the labels does not matter.

    Args:
        generated: the rows "pooled", (n, d).
        n_generated: number of rows, at least 4.
        reference: likewise, of the same width.
        n_reference: likewise.
        seed: seed of the subsets, in [0, 2^32).

    Raises:
        TooFewError: either side has fewer than 4 images.

    Source: Bińkowski et al., "Demystifying MMD GANs" (2018), section 4.
    """
    size = min(SUBSET_IMAGES, n_generated // 2, n_reference // 2)
    if size < 2:
        raise TooFewError(f"a KID takes 4 images a side, got {n_generated} and {n_reference}")
    distances = []
    for start in range(0, SUBSETS, _HELD):
        draws = range(start, start + _HELD)
        x = _subsets(generated, [drawn(n_generated, size, seed, 2 * i) for i in draws])
        y = _subsets(reference, [drawn(n_reference, size, seed, 2 * i + 1) for i in draws])
        distances += [squared_mmd(a, b) for a, b in zip(x, y, strict=True)]
    return float(np.mean(distances)), float(np.std(distances))


def squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Return the unbiased estimate of MMD^2 under ``k(x, y) = (x.y / d + 1)^3``.

    Args:
        x: float of shape (n, d), n at least 2.
        y: float of shape (m, d), m at least 2.

    Source: Bińkowski et al. (2018), eq. 4; Gretton et al., "A Kernel Two-Sample Test" (2012).
    """
    within = sum(_mean_off_diagonal(_kernel(z, z)) for z in (x, y))
    return float(within - 2 * _kernel(x, y).mean())


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # products in the rows' precision, at least float32: float16 ends at 65,504
    single = np.promote_types(x.dtype, np.float32)
    k = (x.astype(single, copy=False) @ y.astype(single, copy=False).T).astype(np.float64)
    k /= x.shape[1]
    k += 1
    return k * k * k


def _mean_off_diagonal(k: np.ndarray) -> float:
    n = len(k)
    return (k.sum() - np.trace(k)) / (n * (n - 1))


def _subsets(batches: Batches, chosen: list[np.ndarray]) -> list[np.ndarray]:
    """Gather several subsets of the rows in one pass over them."""
    found: list[list[np.ndarray]] = [[] for _ in chosen]
    start = 0
    for batch in batches():
        rows = batch["pooled"]
        for indices, held in zip(chosen, found, strict=True):
            low, high = np.searchsorted(indices, (start, start + len(rows)))
            held.append(rows[indices[low:high] - start])
        start += len(rows)
    return [np.concatenate(held) for held in found]
