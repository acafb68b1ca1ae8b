"""Any number of images by any number of processes, with what is kept of each in shards on disk.

Image ``i`` has seed ``seed + i`` and the item ``i`` modulo their number, whoever makes it and in
whichever batch. A process writes each shard beside its place and renames it, so that a killed run
goes on where it was, and nothing held in memory grows with the number of images.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from accelkit.backbones.conditioning import Item
from accelkit.errors import AccelkitError, AccelkitWarning
from accelkit.files.tensors import check_tensors, write_tensors
from accelkit.files.writing import AGAIN
from accelkit.sample.generate import Sampling, check_seed, generate

Rows = dict[str, np.ndarray]
"""What is kept of some images: arrays by name, a row per image."""

_LEAST = 64  # images a shard, so that small batches do not leave a file each
_NAME = re.compile(r"(\d{8,})-(\d{8,})\.safetensors")


@dataclass(frozen=True)
class Work:
    """What is made: how many images, from which items in turn, how, and the first one's seed.

    Raises:
        AccelkitError: fewer than one image, no items, or a seed outside [0, 2^32).
    """

    images: int
    items: tuple[Item, ...]
    sampling: Sampling
    seed: int = 0

    def __post_init__(self) -> None:
        if self.images < 1:
            raise AccelkitError(f"give at least 1 image, got {self.images}")
        if not self.items:
            raise AccelkitError("there is no class or caption to make images of; give at least one")
        check_seed(self.seed)
        check_seed(self.seed + self.images - 1)

    def part(self, places: range) -> tuple[list[Item], list[int]]:
        """Return the items and seeds of the images at ``places``."""
        items = [self.items[i % len(self.items)] for i in places]
        return items, [self.seed + i for i in places]


@dataclass(frozen=True)
class World:
    """The processes that share the work.

    Attributes:
        rank: this one's.
        size: how many there are.
        meet: returns when all have called it.
        told: returns to all what the main one was called with.
    """

    rank: int = 0
    size: int = 1
    meet: Callable[[], None] = lambda: None
    told: Callable[[Any], Any] = lambda said: said

    @property
    def main(self) -> bool:
        """Whether this process tells the others' results."""
        return self.rank == 0

    @staticmethod
    def launched() -> World:
        """Return the processes that ``accelerate launch`` started, one if it did not.

        They have a day to meet: one of them may measure for long what the others wait for.
        """
        from accelerate import PartialState
        from accelerate.utils import broadcast_object_list, parse_flag_from_env

        cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
        state = PartialState(cpu=cpu, timeout=timedelta(days=1))

        def meet() -> None:
            with together(state.num_processes):
                state.wait_for_everyone()

        def told(said: Any) -> Any:
            with together(state.num_processes):
                return broadcast_object_list([said])[0]

        return World(state.process_index, state.num_processes, meet, told)


class RowShards:
    """Rows by the index of their image, in a folder of files named by the range they hold.

    Args:
        folder: made when the first rows are written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def missing(self, images: int, at_most: int) -> list[range]:
        """Return what is not there of the first ``images``, in ranges of so many at most.

        Files that are damaged are removed, with a warning.
        """
        self._remove_damaged()
        gaps, start = [], 0
        for held in [*self._held(), range(images, images)]:
            stop = min(held.start, images)
            gaps += [range(a, min(a + at_most, stop)) for a in range(start, stop, at_most)]
            start = max(start, held.stop)
        return gaps

    def write(self, places: range, rows: Rows) -> None:
        """Keep the rows of the images at ``places``.

        Raises:
            AccelkitError: no room is left on the disk.
        """
        write_tensors(self._path(places), rows, AGAIN)

    def batches(self) -> Iterator[Rows]:
        """Yield all rows in the images' order, a file at a time."""
        from safetensors.numpy import load_file

        for held in self._held():
            yield load_file(self._path(held))

    def _path(self, places: range) -> Path:
        return self.folder / f"{places.start:08d}-{places.stop:08d}.safetensors"

    def _remove_damaged(self) -> None:
        from safetensors import SafetensorError, safe_open

        for path in map(self._path, self._held()):
            try:
                check_tensors(path)
                with safe_open(path, "np"):  # what is cut short has no checksum to read
                    continue
            except FileNotFoundError:  # another process was first
                continue
            except (AccelkitError, OSError, SafetensorError) as error:
                warnings.warn(
                    f"cannot use {path} ({error}); making its images again",
                    AccelkitWarning,
                    stacklevel=2,
                )
                path.unlink(missing_ok=True)

    def _held(self) -> list[range]:
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        matches = [match for path in found if (match := _NAME.fullmatch(path.name))]
        return sorted((range(int(m[1]), int(m[2])) for m in matches), key=lambda r: r.start)


def generate_shards(
    pipe: Any,
    work: Work,
    batch_size: int,
    rows_of: Callable[[range, np.ndarray], Rows],
    shards: RowShards,
    world: World | None = None,
    on_images: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Make what is missing of the images, keep what ``rows_of`` makes of them, and meet.

    Args:
        pipe: the pipeline, as it is to be run.
        work: what to make.
        batch_size: images a call; it changes the speed alone.
        rows_of: called with the images' places and the images, uint8 (n, H, W, 3).
        shards: where rows are kept; shared by all processes, so on a file system that all see.
        world: the processes, by default this one alone.
        on_images: called with this process's images done and their total.

    Raises:
        AccelkitError: fewer than one image a call, or no room is left on the disk.
    """
    if batch_size < 1:
        raise AccelkitError(f"give batches of at least 1 image, got {batch_size}")
    world = world or World()
    length = -(-_LEAST // batch_size) * batch_size
    mine = shards.missing(work.images, length)[world.rank :: world.size]
    world.meet()  # all have looked before the first shard is written
    done, total = 0, sum(map(len, mine))
    for places in mine:
        kept: list[Rows] = []
        for start in range(places.start, places.stop, batch_size):
            batch = range(start, min(start + batch_size, places.stop))
            kept.append(rows_of(batch, generate(pipe, *work.part(batch), work.sampling)))
            done += len(batch)
            on_images(done, total)
        shards.write(places, {k: np.concatenate([rows[k] for rows in kept]) for k in kept[0]})
    world.meet()


@contextmanager
def together(processes: int) -> Iterator[None]:
    """Say in a sentence that another process has ended, which torch reports as a lost connection.

    Args:
        processes: how many there are.

    Raises:
        AccelkitError: one of the others has ended, and this one was waiting for it.
    """
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
        if processes == 1 or not lost:
            raise
        raise AccelkitError(
            f"another of the {processes} processes has ended, and this one cannot go on without "
            "it; see what that one printed, then launch all of them again"
        ) from error
