"""Latents of a data set, encoded once: posterior means and deviations in a cache of shards."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accelkit.backbones.autoencoders import AT_USE, posterior, scaling
from accelkit.data import shards
from accelkit.data.shards import Rows, Shards
from accelkit.data.sources import ImageSource, iter_images

FORMAT = 1


class Latents:
    """Latents of a data set, mapped from their files: memory does not grow with their number.

    Without an autoencoder they are the pixels themselves, scaled to [-1, 1].

    Attributes:
        path: the folder of shards.
        classes: names of the classes in the order of their labels; empty without labels.
        skipped: number of images that could not be read.

    Raises:
        OSError, ValueError, KeyError, TypeError, SafetensorError: the folder is not whole.
    """

    def __init__(self, path: Path, vae: Any | None, applied: Collection[str] = AT_USE) -> None:
        self.path = path
        self._shards = Shards(path)
        self.classes: tuple[str, ...] = tuple(self._shards.index["classes"])
        self.skipped: int = self._shards.index["skipped"]
        self._shift, self._scale = scaling(vae, applied)
        self._pixels = vae is None

    @cached_property
    def labels(self) -> Tensor | None:
        """Class of each latent, int64 (n,), or None."""
        return self._shards.column("label") if "label" in self._shards.names else None

    @cached_property
    def places(self) -> Tensor:
        """Index in the source of each latent's image, int64 (n,)."""
        return self._shards.column("index")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one latent, (C, h, w)."""
        return self._shards.shape("pixels" if self._pixels else "mean")

    def __len__(self) -> int:
        return len(self._shards)

    def sample(self, indices: Tensor, noise: Tensor) -> Tensor:
        """Return latents drawn from the posteriors and scaled as the denoiser expects them.

        Args:
            indices: int64 (B,).
            noise: standard normal, float32 (B, C, h, w).

        Returns:
            float32 (B, C, h, w): (mean + deviation * noise - shift) * scale.
        """
        if self._pixels:
            return self._shards.rows("pixels", indices).float() / 127.5 - 1
        values = self._shards.rows("mean", indices)
        if "std" in self._shards.names:
            values = values + self._shards.rows("std", indices) * noise
        return (values - self._shift) * self._scale


def encode_latents(
    source: ImageSource,
    vae: Any | None,
    *,
    size: int,
    cache_dir: Path | None = None,
    batch: int = 64,
    device: torch.device | str = "cpu",
    flip: bool = False,
    applied: Collection[str] = AT_USE,
    progress: Callable[[int, int], None] | None = None,
) -> Latents:
    """Return the latents of ``source`` under ``vae``, from the cache if they are there.

    A folder of the cache is keyed by the autoencoder's weights, architecture and tiling, the data's
    fingerprint, size and flip; see :func:`accelkit.data.shards.kept`.

    Each shard holds up to 4,096 samples: ``mean`` and ``std`` of the posteriors before scaling,
    float32 (n, C, h, w), because half precision would round them (a deterministic autoencoder has
    no ``std``), or without an autoencoder ``pixels``, uint8 (n, 3, h, w); ``index``, the place of
    the image in ``source``, and with classes ``label``, int64 (n,).

    Args:
        source: the images.
        vae: a diffusers autoencoder of images, on ``device``; None for a model of pixels.
        size: pixels a side that images are brought to.
        cache_dir: default ``$ACCELKIT_CACHE/latents``, else ``~/.cache/accelkit/latents``.
        batch: images encoded at a time.
        device: the device that encodes.
        flip: append the mirrored images, in the same order.
        applied: settings of the autoencoder that the pipeline applies to latents, as for
            :func:`accelkit.backbones.autoencoders.scaling`.
        progress: called with the number of samples encoded and their total.

    Raises:
        AccelkitError: an image cannot be read, the cache cannot be written, or the autoencoder is
            not one that accelkit can call.
    """
    folder = (cache_dir or shards.default_cache("latents")) / _key(source, vae, size, flip)
    total = len(source) * (1 + flip)

    def make(part: Path) -> None:
        index = shards.write(
            _encode(source, vae, size, min(batch, shards.SHARD), device, flip),
            part,
            lambda done: progress(done, total) if progress else None,
        )
        skipped = len(source) - index["count"] // (1 + flip)
        shards.write_index(part, {**index, "classes": source.classes, "skipped": skipped})

    latents = shards.kept(
        folder,
        lambda path: Latents(path, vae, applied),
        make,
        "latents",
        # an image that an earlier call skipped is an error here, unless it may be skipped again
        lambda found: source.skip_bad or not found.skipped,
    )
    latents.path = folder
    return latents


def _key(source: ImageSource, vae: Any | None, size: int, flip: bool) -> str:
    digest = hashlib.sha256()
    if vae is not None:
        shards.add_network(digest, vae, AT_USE)
        if getattr(vae, "use_tiling", False):  # tiles are blended, which changes the latents
            tiles = {name: value for name, value in vars(vae).items() if name.startswith("tile_")}
            digest.update(f"tiles {sorted(tiles.items())}".encode())
    digest.update(f"{source.fingerprint} {size} {flip} {FORMAT}".encode())
    return digest.hexdigest()[:16]


@torch.no_grad()
def _encode(
    source: ImageSource,
    vae: Any | None,
    size: int,
    batch: int,
    device: torch.device | str,
    flip: bool,
) -> Iterator[Rows]:
    for mirrored in (False, True) if flip else (False,):
        for indices, images in iter_images(source, size, batch):
            pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
            pixels = pixels.flip(-1) if mirrored else pixels
            rows = (
                {"pixels": pixels}
                if vae is None
                else posterior(vae, pixels.to(device).float() / 127.5 - 1)
            )
            rows["index"] = torch.from_numpy(indices)
            if source.labels is not None:
                rows["label"] = torch.from_numpy(source.labels[indices])
            yield rows
