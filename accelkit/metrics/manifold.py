"""Precision, recall, density and coverage, by distances between blocks of feature rows."""

from __future__ import annotations

import numpy as np

from accelkit.metrics.rows import BLOCK, Batches, TooFewError, blocks

_ROUNDING = 1e-13
"""Squared distances below this share of the squared norms count as 0; float64's error is 1e-15."""


def manifold_metrics(
    generated: Batches,
    reference: Batches,
    chosen_generated: np.ndarray,
    chosen_reference: np.ndarray,
    nearest: int = 3,
) -> dict[str, float]:
    """Return precision, recall, density and coverage.

    A sample's ball reaches to its ``nearest``-th neighbour in its own set, not counting itself.
    Precision is the share of generated samples in any real sample's ball, and recall the share of
    real samples in any generated sample's ball. Density is the mean number of real balls that a
    generated sample is in, over ``nearest``, and coverage the share of real balls that hold a
    generated sample. Balls are closed. Memory holds a few numbers for each row, and the distances
    of one block to another.

    Args:
        generated: the rows "pooled", (n, d).
        reference: likewise, of the same width.
        chosen_generated: ascending indices, int64, of the rows to use.
        chosen_reference: likewise; the same number, or precision and recall are not comparable.
        nearest: the number k of the neighbour.

    Raises:
        TooFewError: either set has no more than ``nearest`` samples.

    Source: Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing Generative
    Models" (2019), eq. 1 to 3; Naeem et al., "Reliable Fidelity and Diversity Metrics for
    Generative Models" (2020), eq. 3 and 4, who take k = 5.
    """
    n, m = len(chosen_generated), len(chosen_reference)
    if nearest < 1 or min(n, m) <= nearest:
        raise TooFewError(
            f"{n} generated and {m} real images were given for neighbour {nearest}; the neighbour "
            "must be at least 1, and both sets larger than it"
        )
    # a common offset costs precision and does not change distances
    centre = next(blocks(reference, "pooled", chosen_reference)).astype(np.float64).mean(axis=0)
    generated_radii = _radii(generated, chosen_generated, nearest, centre)
    real_radii = _radii(reference, chosen_reference, nearest, centre)
    in_real = np.zeros(n, dtype=bool)
    in_generated, covered = np.zeros(m, dtype=bool), np.zeros(m, dtype=bool)
    balls = 0
    for i, real in enumerate(blocks(reference, "pooled", chosen_reference)):
        r = _places(i, real)
        for j, made in enumerate(blocks(generated, "pooled", chosen_generated)):
            g = _places(j, made)
            distances = squared_distances(real - centre, made - centre)  # (real, generated)
            inside = distances <= real_radii[r, None]
            in_real[g] |= inside.any(axis=0)
            covered[r] |= inside.any(axis=1)
            balls += int(inside.sum())
            in_generated[r] |= (distances <= generated_radii[g]).any(axis=1)
    return {
        "precision": float(in_real.mean()),
        "recall": float(in_generated.mean()),
        "density": balls / (nearest * n),
        "coverage": float(covered.mean()),
    }


def squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return ``|x_i - y_j|^2``, float64 (n, m), of float rows (n, d) and (m, d)."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    norms = np.square(x).sum(axis=1)[:, None] + np.square(y).sum(axis=1)
    distances = norms - 2 * (x @ y.T)
    distances[distances < _ROUNDING * norms] = (
        0  # otherwise a copy would be outside a ball of radius 0
    )
    return distances


def _radii(batches: Batches, chosen: np.ndarray, nearest: int, centre: np.ndarray) -> np.ndarray:
    """Return the squared distance of each row to its ``nearest``-th neighbour, float64 (n,)."""
    closest = np.full((len(chosen), nearest), np.inf)
    for i, x in enumerate(blocks(batches, "pooled", chosen)):
        for j, y in enumerate(blocks(batches, "pooled", chosen)):
            if j < i:
                continue
            distances = squared_distances(x - centre, y - centre)
            if i == j:
                np.fill_diagonal(distances, np.inf)
            else:
                _keep(closest, _places(j, y), distances.T)
            _keep(closest, _places(i, x), distances)
    return closest.max(axis=1)


def _keep(closest: np.ndarray, places: slice, distances: np.ndarray) -> None:
    """Merge new distances (rows, m) into the smallest ones found for some rows so far."""
    nearest = closest.shape[1]
    both = np.concatenate([closest[places], distances], axis=1)
    closest[places] = np.partition(both, nearest - 1, axis=1)[:, :nearest]


def _places(index: int, block: np.ndarray) -> slice:
    return slice(index * BLOCK, index * BLOCK + len(block))
