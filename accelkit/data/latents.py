"""Latents of a data set, computed once and kept: posterior means and deviations in shards."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shutil
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from accelkit.data.sources import ImageSource, iter_images
from accelkit.errors import AccelkitError, AccelkitWarning

FORMAT = 1
SHARD = 4096
INDEX = "index.json"
_LOCK = ".lock"
AT_USE = frozenset({"scaling_factor", "shift_factor", "latents_mean", "latents_std"})
"""Settings of an autoencoder that apply to its latents when they are used, not when made."""


class Latents:
    """Latents of a data set, mapped from their files: memory does not grow with their number.

    Attributes:
        path: the folder of shards.
        classes: names of the classes, the label being the place; empty without labels.
        skipped: how many images could not be read.

    Raises:
        OSError, ValueError, KeyError, TypeError, SafetensorError: the folder is not whole.
    """

    def __init__(self, path: Path, vae: Any) -> None:
        index = json.loads((path / INDEX).read_text(encoding="utf-8"))
        self.path = path
        self.classes: tuple[str, ...] = tuple(index["classes"])
        self.skipped: int = index["skipped"]
        self._scale = vae.config.scaling_factor
        self._shift = getattr(vae.config, "shift_factor", None) or 0.0
        self._shards = [load_file(path / name) for name in index["files"]]
        self._starts = [0, *accumulate(len(shard["mean"]) for shard in self._shards)]
        if len(self) != index["count"] or len(self) == 0:
            raise ValueError(f"{len(self)} latents where {index['count']} were written")

    @cached_property
    def labels(self) -> Tensor | None:
        """Class of each latent, int64 (n,), or None."""
        if "label" not in self._shards[0]:
            return None
        return torch.cat([shard["label"] for shard in self._shards])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one latent, (C, h, w)."""
        return tuple(self._shards[0]["mean"].shape[1:])

    def __len__(self) -> int:
        return self._starts[-1]

    def sample(self, indices: Tensor, noise: Tensor) -> Tensor:
        """Return latents drawn from the posteriors and scaled as the denoiser expects them.

        Args:
            indices: int64 (B,).
            noise: standard normal, float32 (B, C, h, w).

        Returns:
            float32 (B, C, h, w): (mean + deviation * noise - shift) * scale.
        """
        places = [(bisect_right(self._starts, i) - 1, i) for i in indices.tolist()]
        mean = torch.stack([self._shards[s]["mean"][i - self._starts[s]] for s, i in places])
        std = torch.stack([self._shards[s]["std"][i - self._starts[s]] for s, i in places])
        return (mean + std * noise - self._shift) * self._scale


def encode_latents(
    source: ImageSource,
    vae: Any,
    *,
    size: int,
    cache_dir: Path | None = None,
    batch: int = 64,
    device: torch.device | str = "cpu",
    flip: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Latents:
    """Return the latents of ``source`` under ``vae``, from the cache if they are there.

    A folder is keyed by the autoencoder's weights and architecture, the data's fingerprint, size
    and flip. It is written beside and renamed into place, so an interrupted encoding leaves nothing
    half done, and two at a time both end with a whole one. What killed processes left is removed.

    Each shard holds up to 4,096 samples: ``mean`` and ``std`` of the posteriors before scaling,
    float32 (n, C, h, w), because half precision would round them; ``index``, the place of the
    image in ``source``, and with classes ``label``, int64 (n,).

    Args:
        source: the images.
        vae: a diffusers AutoencoderKL, on ``device``.
        size: pixels a side that images are brought to.
        cache_dir: default ``$ACCELKIT_CACHE/latents``, else ``~/.cache/accelkit/latents``.
        batch: images encoded at a time.
        device: where.
        flip: append the mirrored images, in the same order.
        progress: called with the samples encoded and their total.

    Raises:
        AccelkitError: an image cannot be read, or the cache cannot be written.
    """
    cache = cache_dir or default_cache()
    folder = cache / _key(source, vae, size, flip)
    cached = _cached(folder, vae)
    # images left out by an earlier call are this one's errors, unless it leaves them out as well
    if cached is not None and (source.skip_bad or not cached.skipped):
        return cached
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _at_work(cache) as part:
            _write(
                source,
                _encode(source, vae, size, min(batch, SHARD), device, flip),
                progress,
                flip,
                part,
            )
            latents = Latents(part, vae)  # mapped before it is in anybody's reach
            _install(part, folder)
    except (OSError, SafetensorError) as error:
        raise AccelkitError(
            f"cannot write latents to {cache} ({error}); make room there, or name another folder "
            "in ACCELKIT_CACHE"
        ) from error
    latents.path = folder
    return latents


def default_cache() -> Path:
    """Return ``$ACCELKIT_CACHE/latents``, or the user's cache directory's."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("ACCELKIT_CACHE") or Path(home) / "accelkit") / "latents"


@contextmanager
def _at_work(cache: Path) -> Iterator[Path]:
    """Give a new folder to encode into; remove it afterwards, and those of killed processes before.

    All who encode share a lock that the system releases with a process, however that ends. Who
    gets it alone knows that the folders lying there belong to nobody.
    """
    lock = os.open(cache / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for stale in cache.glob("partial-*"):
                shutil.rmtree(stale, ignore_errors=True)
        fcntl.flock(lock, fcntl.LOCK_SH)
        part = cache / f"partial-{secrets.token_hex(8)}"
        try:
            part.mkdir()
            yield part
        finally:
            shutil.rmtree(part, ignore_errors=True)
    finally:
        os.close(lock)


def _key(source: ImageSource, vae: Any, size: int, flip: bool) -> str:
    settings = {k: v for k, v in vae.config.items() if k[0] != "_" and k not in AT_USE}
    digest = hashlib.sha256(f"{type(vae).__name__} {sorted(settings.items())}".encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().data)
    digest.update(f"{source.fingerprint} {size} {flip} {FORMAT}".encode())
    return digest.hexdigest()[:16]


def _cached(folder: Path, vae: Any) -> Latents | None:
    if not folder.exists():
        return None
    try:
        return Latents(folder, vae)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        warnings.warn(
            f"the cached latents in {folder} are broken ({error}); encoding again",
            AccelkitWarning,
            stacklevel=3,
        )
        return None


@torch.no_grad()
def _encode(
    source: ImageSource, vae: Any, size: int, batch: int, device: torch.device | str, flip: bool
) -> Iterator[dict[str, Tensor]]:
    for mirrored in (False, True) if flip else (False,):
        for indices, images in iter_images(source, size, batch):
            pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(device).float() / 127.5 - 1
            pixels = pixels.flip(-1) if mirrored else pixels
            posterior = vae.encode(pixels.to(vae.dtype)).latent_dist
            rows = {"mean": posterior.mean, "std": posterior.std}
            rows = {n: tensor.float().cpu().contiguous() for n, tensor in rows.items()}
            rows["index"] = torch.from_numpy(indices)
            if source.labels is not None:
                rows["label"] = torch.from_numpy(source.labels[indices])
            yield rows


def _write(
    source: ImageSource,
    batches: Iterator[dict[str, Tensor]],
    progress: Callable[[int, int], None] | None,
    flip: bool,
    folder: Path,
) -> None:
    files: list[str] = []
    held: list[dict[str, Tensor]] = []
    done = kept = 0

    def flush() -> None:
        files.append(f"shard-{len(files):05d}.safetensors")
        save_file({n: torch.cat([rows[n] for rows in held]) for n in held[0]}, folder / files[-1])
        held.clear()

    for rows in batches:
        if done - kept + len(rows["index"]) > SHARD:
            flush()
            kept = done
        held.append(rows)
        done += len(rows["index"])
        if progress is not None:
            progress(done, len(source) * (1 + flip))
    flush()
    skipped = len(source) - done // (1 + flip)
    index = {"count": done, "files": files, "classes": source.classes, "skipped": skipped}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _install(part: Path, folder: Path) -> None:
    """Rename ``part`` to ``folder``; what lies there is moved away whole, never seen half gone."""
    old = part.with_name(f"{part.name}-replaced")
    with suppress(FileNotFoundError):
        folder.rename(old)
    try:
        part.rename(folder)
    except OSError:  # another process was first, with the same content
        if not (folder / INDEX).is_file():
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
