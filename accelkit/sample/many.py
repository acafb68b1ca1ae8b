"""Images in any number, by any number of processes, with results of each in shards on disk.

Image ``i`` has seed ``seed + i`` and item ``i`` modulo the number of items, whichever process makes
it in whichever batch. A shard is written next to its place and renamed into it, so a killed run can
be resumed, and memory does not grow with the number of images.
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
"""Results of some images: arrays by name, a row per image."""

_LEAST = 64  # images in a shard, so that small batches do not write a file each
_NAME = re.compile(r"(\d{8,})-(\d{8,})\.safetensors")


@dataclass(frozen=True)
class Work:
    """Images to make: their number, their items in turn, the sampling and the first seed.

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
    """The processes that share the work, as one of them sees it.

    Attributes:
        rank: index of this process.
        size: number of processes.
        wait: function that returns once every process has called it.
        broadcast: function that returns the main process's argument in every process.
    """

    rank: int = 0
    size: int = 1
    wait: Callable[[], None] = lambda: None
    broadcast: Callable[[Any], Any] = lambda value: value

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and prints results."""
        return self.rank == 0

    @staticmethod
    def launched() -> World:
        """Return the processes that ``accelerate launch`` started, or this one alone.

        They wait for each other for up to a day, since one may measure while the others wait.
        """
        from accelerate import PartialState
        from accelerate.utils import broadcast_object_list, parse_flag_from_env

        cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
        state = PartialState(cpu=cpu, timeout=timedelta(days=1))

        def wait() -> None:
            with explain_lost_process(state.num_processes):
                state.wait_for_everyone()

        def broadcast(value: Any) -> Any:
            with explain_lost_process(state.num_processes):
                return broadcast_object_list([value])[0]

        return World(state.process_index, state.num_processes, wait, broadcast)


class RowShards:
    """Rows by the index of their image, in a folder of files named by their range.

    Args:
        folder: the folder; created with the first rows.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def missing(self, images: int, at_most: int) -> list[range]:
        """Return the missing ones of the first ``images``, in ranges of at most ``at_most``.

        Damaged files are removed, with a warning.
        """
        self._remove_damaged()
        gaps, start = [], 0
        for held in [*self._held(), range(images, images)]:
            stop = min(held.start, images)
            gaps += [range(a, min(a + at_most, stop)) for a in range(start, stop, at_most)]
            start = max(start, held.stop)
        return gaps

    def write(self, places: range, rows: Rows) -> None:
        """Write the rows of the images at ``places``.

        Raises:
            AccelkitError: the disk is full.
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
                with safe_open(path, "np"):  # a truncated file has no checksum to compare
                    continue
            except FileNotFoundError:  # another process has removed it
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
    """Make the images that are missing, write their rows, and wait for the other processes.

    Args:
        pipe: the pipeline.
        work: the images to make.
        batch_size: images in a call; it affects the speed alone.
        rows_of: function from places and images, uint8 (n, H, W, 3), to rows.
        shards: shards of the rows, on a file system that all processes share.
        world: the processes; by default this one alone.
        on_images: called with this process's images done and their total.

    Raises:
        AccelkitError: ``batch_size`` is below 1, or the disk is full.
    """
    if batch_size < 1:
        raise AccelkitError(f"give batches of at least 1 image, got {batch_size}")
    world = world or World()
    length = -(-_LEAST // batch_size) * batch_size
    mine = shards.missing(work.images, length)[world.rank :: world.size]
    world.wait()  # Every process has listed its share before the first shard is written.
    done, total = 0, sum(map(len, mine))
    for places in mine:
        kept: list[Rows] = []
        for start in range(places.start, places.stop, batch_size):
            batch = range(start, min(start + batch_size, places.stop))
            kept.append(rows_of(batch, generate(pipe, *work.part(batch), work.sampling)))
            done += len(batch)
            on_images(done, total)
        shards.write(places, {k: np.concatenate([rows[k] for rows in kept]) for k in kept[0]})
    world.wait()


@contextmanager
def explain_lost_process(processes: int) -> Iterator[None]:
    """Turn torch's error for a lost connection into a sentence.

    Args:
        processes: number of processes.

    Raises:
        AccelkitError: this process was waiting for another one, which has ended.
    """
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
        if processes == 1 or not lost:
            raise
        raise AccelkitError(
            f"another of the {processes} processes has ended, and this one cannot continue without "
            "it; see its output, then launch all of them again"
        ) from error
