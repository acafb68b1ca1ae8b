"""Feature rows, read as often as needed, in blocks that do not depend on how they are batched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np

from accelkit.errors import AccelkitError

Rows: TypeAlias = dict[str, np.ndarray]
Batches: TypeAlias = Callable[[], Iterator[Rows]]
"""Returns rows by name, (n, d) each, in the order of the images, in batches of any size."""

BLOCK = 1000


class TooFewError(AccelkitError):
    """There are too few images for a figure, which is left out with this reason."""


def shapes(batches: Batches) -> dict[str, tuple[int, int]]:
    """Return the number and width of the rows, by name.

    Raises:
        AccelkitError: rows are not two-dimensional, their width changes, or some images lack one.
    """
    found: dict[str, tuple[int, int]] = {}
    total = 0
    for batch in batches():
        for name, rows in batch.items():
            n, width = found.get(name, (0, rows.shape[-1]))
            if rows.ndim != 2 or rows.shape[1] != width:
                raise AccelkitError(
                    f"{name} features have shape {rows.shape} after {n} rows, expected "
                    f"(n, {width}); use one extractor throughout"
                )
            found[name] = n + len(rows), width
        total += len(next(iter(batch.values())))
    for name, (n, _) in found.items():
        if n != total:
            raise AccelkitError(f"{n} rows of {name} features for {total} images; extract them all")
    return found


def blocks(batches: Batches, name: str, chosen: np.ndarray | None = None) -> Iterator[np.ndarray]:
    """Yield the rows called ``name`` in blocks of 1,000, the last one shorter.

    Sums over the blocks have the same bits however the batches are cut, and no batch is kept.

    Args:
        batches: the source of the rows.
        name: name of the rows.
        chosen: ascending indices, int64, of the rows to yield; None for all.
    """
    held: list[np.ndarray] = []
    size = start = 0
    for batch in batches():
        rows = batch[name]
        if chosen is None:
            fresh = rows
        else:
            low, high = np.searchsorted(chosen, (start, start + len(rows)))
            fresh = rows[chosen[low:high] - start]
        start += len(rows)
        while len(fresh):
            part = fresh[: BLOCK - size]
            held.append(part.copy())
            size, fresh = size + len(part), fresh[len(part) :]
            if size == BLOCK:
                yield np.concatenate(held)
                held, size = [], 0
    if held:
        yield np.concatenate(held)


def parts(
    batches: Batches, name: str, n: int, count: int, period: int = 1
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield rows in order, cut into ``count`` runs, each piece with the number of its run.

    Labels repeat in rounds of the classes. A run has consecutive rows and starts where a round
    does; the numbers of whole rounds differ by at most one, and the last run has the rest.

    Args:
        batches: the source of the rows.
        name: name of the rows.
        n: number of rows, at least ``count * period`` if ``count`` is above 1.
        count: number of runs.
        period: number of rows in a round.
    """
    edges = [i * (n // period) // count * period for i in range(count)] + [n]
    start = 0
    for rows in blocks(batches, name):
        for part in range(count):
            low, high = max(edges[part], start), min(edges[part + 1], start + len(rows))
            if low < high:
                yield part, rows[low - start : high - start]
        start += len(rows)


def dealt(
    batches: Batches, name: str, n: int, count: int, period: int = 1
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield rows with the group that their round is dealt to: row i to ``(i // period) % count``.

    Groups have equally many whole rounds, as a jackknife needs. The rows that remain have the
    number ``count``, which belongs to no group.

    Args:
        batches: the source of the rows.
        name: name of the rows.
        n: number of rows.
        count: number of groups.
        period: number of rows in a round.
    """
    end = n // (count * period) * count * period
    start = 0
    for rows in blocks(batches, name):
        places = np.arange(start, start + len(rows))
        groups = np.where(places < end, places // period % count, count)
        for group in np.unique(groups):
            yield int(group), rows[groups == group]
        start += len(rows)


def drawn(n: int, size: int, seed: int, draw: int) -> np.ndarray:
    """Return ascending indices of ``size`` of ``n`` rows, int64; all of them if ``size`` is ``n``.

    They are drawn by numpy's legacy generator, whose stream is promised never to change.

    Args:
        n: number of rows.
        size: number of rows to draw, at most ``n``.
        seed: seed in [0, 2^32).
        draw: number of the draw, in [0, 2^32).
    """
    return np.sort(np.random.RandomState([seed, draw]).permutation(n)[:size])
