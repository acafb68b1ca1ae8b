"""Text embeddings of a data set's captions, encoded once and kept in a cache of shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from accelkit.backbones.conditioning import Conditioning
from accelkit.data import shards
from accelkit.data.shards import Rows, Shards

FORMAT = 1


class Prompts:
    """Embedded captions by sample, mapped from their files.

    Args:
        path: the folder of shards; its first row is the empty caption.
        places: the row of each sample, int64 (n,).

    Raises:
        OSError, ValueError, KeyError, TypeError, SafetensorError: the folder is not whole.
    """

    def __init__(self, path: Path, places: Tensor) -> None:
        self._shards = Shards(path)
        self._places = places

    def rows(self, indices: Tensor, drop: Tensor) -> Rows:
        """Return the text arguments of the model's call, by name.

        Args:
            indices: samples, int64 (B,).
            drop: bool (B,), true for samples that get the empty caption.
        """
        chosen = torch.where(drop, 0, self._places[indices])
        return {name: self._shards.rows(name, chosen) for name in self._shards.names}


def encode_captions(
    captions: Sequence[str],
    pipe: Any,
    conditioning: Conditioning,
    *,
    cache_dir: Path | None = None,
    batch: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> Prompts:
    """Return the embeddings of ``captions``, from the cache if they are there.

    Equal captions are embedded once. A folder of the cache is keyed by the text encoders' weights
    and architecture, the tokenizers, and the captions. It holds one row of each tensor that the
    model's call takes, in the encoders' own dtype, for the empty caption and then for each other.

    Args:
        captions: one per sample.
        pipe: the pipeline whose ``encode_prompt`` embeds them.
        conditioning: the conditioning of its model.
        cache_dir: default ``$ACCELKIT_CACHE/prompts``, else ``~/.cache/accelkit/prompts``.
        batch: captions embedded at a time.
        progress: called with the number of captions embedded and their total.

    Raises:
        AccelkitError: the cache cannot be written.
    """
    distinct = list(dict.fromkeys(["", *captions]))
    place = {caption: row for row, caption in enumerate(distinct)}
    places = torch.tensor([place[caption] for caption in captions])
    folder = (cache_dir or shards.default_cache("prompts")) / _key(distinct, pipe)

    def encode() -> Iterator[Rows]:
        for start in range(0, len(distinct), batch):
            yield conditioning.encode(pipe, distinct[start : start + batch])

    def make(part: Path) -> None:
        written = lambda done: progress(done, len(distinct)) if progress else None  # noqa: E731
        shards.write_index(part, shards.write(encode(), part, written))

    return shards.kept(folder, lambda path: Prompts(path, places), make, "text embeddings")


def _key(captions: Sequence[str], pipe: Any) -> str:
    digest = hashlib.sha256(f"{type(pipe).__name__} {FORMAT}".encode())
    for name, part in sorted(pipe.components.items()):
        if isinstance(part, nn.Module) and name.startswith("text_encoder"):
            shards.add_network(digest, part)
        elif name.startswith("tokenizer") and part is not None:
            vocabulary = sorted(part.get_vocab().items())
            digest.update(f"{type(part).__name__} {vocabulary}".encode())
    digest.update(json.dumps(list(captions)).encode())
    return digest.hexdigest()[:16]
