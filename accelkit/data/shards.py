"""A cache of tensors that are computed once for a data set: shards in folders keyed by content."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from accelkit.errors import AccelkitError, AccelkitWarning
from accelkit.files.locks import shared
from accelkit.files.tensors import load_tensors, write_tensors
from accelkit.files.writing import AGAIN, flush, flush_folder, read_record, write_record

SHARD = 4096
SHARD_BYTES = 512 * 2**20
GO_ON = f"{AGAIN}, or name another folder in ACCELKIT_CACHE"
"""Advice for a cache that cannot be written."""
INDEX = "index.json"

Rows = dict[str, Tensor]
T = TypeVar("T")


class Shards:
    """Rows of named tensors, mapped from their files: memory does not grow with their number.

    Attributes:
        index: the record that was written with them.

    Raises:
        OSError, ValueError, KeyError, TypeError, SafetensorError: the folder is not whole.
    """

    def __init__(self, path: Path) -> None:
        self.index: dict[str, Any] = read_record(path / INDEX)
        with ThreadPoolExecutor() as pool:  # comparing checksums takes a while
            self._files = list(pool.map(load_tensors, [path / n for n in self.index["files"]]))
        self._starts = [0, *accumulate(len(next(iter(f.values()))) for f in self._files)]
        if len(self) != self.index["count"] or len(self) == 0:
            raise ValueError(f"{len(self)} rows where {self.index['count']} were written")

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def names(self) -> list[str]:
        """Names of the tensors."""
        return sorted(self._files[0])

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one row."""
        return tuple(self._files[0][name].shape[1:])

    def rows(self, name: str, indices: Tensor) -> Tensor:
        """Return the rows (B, ...) at ``indices``, int64 (B,)."""
        places = [(bisect_right(self._starts, i) - 1, i) for i in indices.tolist()]
        return torch.stack([self._files[s][name][i - self._starts[s]] for s, i in places])

    def column(self, name: str) -> Tensor:
        """Return all rows of a small tensor."""
        return torch.cat([file[name] for file in self._files])


def write(batches: Iterator[Rows], folder: Path, on_rows: Callable[[int], None]) -> dict[str, Any]:
    """Write batches of rows into ``folder`` and return the index that :class:`Shards` reads.

    A shard holds up to 4,096 rows or 512 MiB, and at least one batch. The caller completes the
    index and writes it last, by :func:`write_index`.

    Args:
        batches: rows by name, the same number of rows of each and the same names in every batch.
        folder: an existing folder.
        on_rows: called with the number of rows written so far.
    """
    files: list[str] = []
    held: list[Rows] = []
    done = kept = size = 0

    def close_shard() -> None:
        files.append(f"shard-{len(files):05d}.safetensors")
        columns = {name: torch.cat([rows[name] for rows in held]) for name in held[0]}
        write_tensors(folder / files[-1], columns, GO_ON)
        held.clear()

    for rows in batches:
        count = len(next(iter(rows.values())))
        more = sum(tensor.nbytes for tensor in rows.values())
        if held and (done - kept + count > SHARD or size + more > SHARD_BYTES):
            close_shard()
            kept, size = done, 0
        held.append({name: tensor.contiguous() for name, tensor in rows.items()})
        done, size = done + count, size + more
        on_rows(done)
    close_shard()
    return {"count": done, "files": files}


def write_index(folder: Path, index: dict[str, Any]) -> None:
    """Write the index that :func:`write` returned, with anything the caller added."""
    write_record(folder / INDEX, index, GO_ON)


def in_order(folder: Path) -> Iterator[Rows]:
    """Yield all rows in order, one file at a time, so that memory holds no more than one.

    Raises:
        OSError, ValueError, KeyError, SafetensorError: the folder is not whole.
    """
    for name in read_record(folder / INDEX)["files"]:
        yield load_file(folder / name)  # its checksum was compared when the folder was opened


def kept(
    folder: Path,
    read: Callable[[Path], T],
    make: Callable[[Path], None],
    what: str,
    suits: Callable[[T], bool] = lambda found: True,
) -> T:
    """Return the content of ``folder``, which is made if it is missing, broken or unsuitable.

    A folder is made next to its place and renamed. An interrupted process leaves no half-made
    folder, and two processes at a time both end with a whole one. Folders of killed processes are
    removed.

    Args:
        folder: the folder, in the folder of the cache.
        read: opens a folder, and raises if it is not whole.
        make: writes a folder.
        what: the content in messages, such as ``"latents"``.
        suits: whether content that is found will do.

    Raises:
        AccelkitError: the cache cannot be written.
    """
    found = cached(folder, read, what)
    if found is not None and suits(found):
        return found
    cache = folder.parent
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _partial(cache) as part:
            make(part)
            found = read(part)  # mapped before another process can replace it
            _install(part, folder)
    except (OSError, SafetensorError) as error:
        raise AccelkitError(
            f"cannot write {what} to {cache} ({error}); make room there, or name another folder "
            "in ACCELKIT_CACHE"
        ) from error
    return found


def cached(folder: Path, read: Callable[[Path], T], what: str) -> T | None:
    """Return the content of ``folder``, or None if it is missing, or broken, which warns."""
    if not folder.exists():
        return None
    try:
        return read(folder)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        warnings.warn(
            f"the cached {what} in {folder} are broken ({error}); encoding again",
            AccelkitWarning,
            stacklevel=4,
        )
        return None


@contextmanager
def _partial(cache: Path) -> Iterator[Path]:
    """Make a folder to write into; remove it afterwards, and those of killed processes before."""

    def remove_stale() -> None:
        for stale in cache.glob("partial-*"):
            shutil.rmtree(stale, ignore_errors=True)

    with shared(cache, remove_stale):
        part = cache / f"partial-{secrets.token_hex(8)}"
        try:
            part.mkdir()
            yield part
        finally:
            shutil.rmtree(part, ignore_errors=True)


def default_cache(what: str) -> Path:
    """Return ``$ACCELKIT_CACHE/what``, or that folder in the user's cache directory."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("ACCELKIT_CACHE") or Path(home) / "accelkit") / what


def add_network(digest: Any, network: nn.Module, leave_out: frozenset[str] = frozenset()) -> None:
    """Add a network's class, configuration and weights to a hashlib digest.

    Args:
        digest: the hashlib object.
        network: a network of diffusers or transformers.
        leave_out: names of settings that are not added.
    """
    config: Any = network.config
    settings = dict(config if isinstance(config, dict) else config.to_diff_dict())
    settings = {k: v for k, v in settings.items() if k[0] != "_" and k not in leave_out}
    digest.update(f"{type(network).__name__} {sorted(settings.items())}".encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().data)


def fingerprint_of(network: nn.Module) -> str:
    """Return a digest of a network's class, configuration and weights."""
    digest = hashlib.sha256()
    add_network(digest, network)
    return digest.hexdigest()


def fingerprint(pipe: Any) -> str:
    """Return a digest of a pipeline's networks and noise process, whatever their origin."""
    digest = hashlib.sha256()
    for name, part in sorted(pipe.components.items()):
        if isinstance(part, nn.Module):
            digest.update(f"{name}\0".encode())
            add_network(digest, part, frozenset({"transformers_version"}))
    scheduler = {k: v for k, v in pipe.scheduler.config.items() if k[0] != "_"}
    digest.update(f"{type(pipe.scheduler).__name__} {sorted(scheduler.items())}".encode())
    return digest.hexdigest()


def _install(part: Path, folder: Path) -> None:
    """Rename ``part`` to ``folder``; an old folder is moved away whole before it is removed."""
    flush(part)
    old = part.with_name(f"{part.name}-replaced")
    with suppress(FileNotFoundError):
        folder.rename(old)
    try:
        part.rename(folder)
        flush_folder(folder.parent)
    except OSError:  # another process was first, with the same content
        if not (folder / INDEX).is_file():
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
