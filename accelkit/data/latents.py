"""Latents of a data set, computed once and kept: posterior means and deviations in shards."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from accelkit.data.sources import ImageSource, iter_images
from accelkit.errors import AccelkitWarning
from accelkit.files import explain_full_disk, write_json

FORMAT = 1
SHARD = 4096
INDEX = "index.json"


class Latents:
    """Latents of a data set, mapped from their files: memory does not grow with their number.

    Attributes:
        path: the folder of shards.
        labels: int64 (n,) in memory, or None.
        skipped: how many images could not be read.
    """

    def __init__(self, path: Path, vae: Any) -> None:
        index = json.loads((path / INDEX).read_text())
        self.path = path
        self.skipped: int = index["skipped"]
        self._scale = vae.config.scaling_factor
        self._shift = getattr(vae.config, "shift_factor", None) or 0.0
        self._rows: int = index["shard"]
        self._shards = [load_file(path / name) for name in index["files"]]
        self._count = sum(len(shard["mean"]) for shard in self._shards)
        if self._count != index["count"]:
            raise ValueError(f"{self._count} latents where {index['count']} were written")

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
        return self._count

    def sample(self, indices: Tensor, noise: Tensor) -> Tensor:
        """Return latents drawn from the posteriors and scaled as the denoiser expects them.

        Args:
            indices: int64 (B,).
            noise: standard normal, (B, C, h, w).

        Returns:
            float32 (B, C, h, w): (mean + deviation * noise - shift) * scale.
        """
        places = [divmod(i, self._rows) for i in indices.tolist()]
        mean = torch.stack([self._shards[s]["mean"][row] for s, row in places])
        std = torch.stack([self._shards[s]["std"][row] for s, row in places])
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
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Latents:
    """Return the latents of ``source`` under ``vae``, from the cache if they are there.

    A folder is keyed by the autoencoder's weights, the data's fingerprint, size and flip. It is
    written beside and renamed into place, so an interrupted encoding leaves nothing half done and
    of two at a time the first to finish wins.

    Args:
        source: the images.
        vae: a diffusers AutoencoderKL.
        size: pixels a side that images are brought to.
        cache_dir: default ``$ACCELKIT_CACHE/latents``, else ``~/.cache/accelkit/latents``.
        batch: images encoded at a time.
        device: where.
        flip: append the mirrored images.
        progress: called with the images encoded and their total.

    Raises:
        AccelkitError: an image cannot be read, or there is no room for the cache.
    """
    cache = cache_dir or default_cache()
    folder = cache / _key(source, vae, size, flip)
    if (folder / INDEX).is_file():
        try:
            return Latents(folder, vae)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            warnings.warn(
                f"the cached latents in {folder} are broken ({error}); encoding again",
                AccelkitWarning,
                stacklevel=2,
            )
    with explain_full_disk(cache):
        cache.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix="partial-", dir=cache))
        try:
            _encode(source, vae, size, batch, device, flip, progress, part)
            shutil.rmtree(folder, ignore_errors=True)
            try:
                part.rename(folder)
            except OSError:  # another process was first, with the same content
                if not (folder / INDEX).is_file():
                    raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return Latents(folder, vae)


def default_cache() -> Path:
    """Return ``$ACCELKIT_CACHE/latents``, or the user's cache directory's."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("ACCELKIT_CACHE") or Path(home) / "accelkit") / "latents"


def _key(source: ImageSource, vae: Any, size: int, flip: bool) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().float().numpy().tobytes())
    digest.update(f"{source.fingerprint} {size} {flip} {FORMAT}".encode())
    return digest.hexdigest()[:20]


@torch.no_grad()
def _encode(
    source: ImageSource,
    vae: Any,
    size: int,
    batch: int,
    device: torch.device | str,
    flip: bool,
    progress: Callable[[int, int], None],
    folder: Path,
) -> None:
    files: list[str] = []
    rows: dict[str, list[Tensor]] = {}
    count = pending = 0
    total = len(source) * (2 if flip else 1)

    def write() -> None:
        nonlocal rows, pending
        shard = {name: torch.cat(parts) for name, parts in rows.items()}
        whole, rows = {n: t[:SHARD].clone() for n, t in shard.items()}, {}
        files.append(f"shard-{len(files):05d}.safetensors")
        save_file(whole, folder / files[-1])
        pending = max(0, pending - SHARD)
        if pending:
            rows = {n: [t[SHARD:].clone()] for n, t in shard.items()}

    for mirrored in (False, True) if flip else (False,):
        for indices, images in iter_images(source, size, batch):
            pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(device).float() / 127.5 - 1
            posterior = vae.encode(pixels.flip(-1) if mirrored else pixels).latent_dist
            rows.setdefault("mean", []).append(posterior.mean.float().cpu().contiguous())
            rows.setdefault("std", []).append(posterior.std.float().cpu().contiguous())
            if source.labels is not None:
                rows.setdefault("label", []).append(torch.from_numpy(source.labels[indices]))
            count, pending = count + len(indices), pending + len(indices)
            progress(count, total)
            while pending >= SHARD:
                write()
    if pending:
        write()
    skipped = len(source) * (2 if flip else 1) - count
    index = {"count": count, "shard": SHARD, "files": files, "skipped": skipped}
    write_json(folder / INDEX, index)
