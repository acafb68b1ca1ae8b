"""Train the small network behind the digit features, which takes about a minute.

It runs on one thread, so that on one machine the bytes of the file depend on the seed alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional

from accelkit.data.digits import SIZE, digits
from accelkit.files.writing import AGAIN, write_bytes
from accelkit.metrics.digit_classifier import NAME, VERSION, DigitClassifier, to_grey

SPLIT_SEED = 0
HELD_OUT = 0.2
METADATA_KEY = "accelkit"

EPOCHS = 60
BATCH_SIZE = 64
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.05
MAX_SHIFT = 2  # pixels
MAX_ROTATION = 10  # degrees
MAX_SCALING = 0.1


def split(labels: np.ndarray, seed: int = SPLIT_SEED) -> tuple[np.ndarray, np.ndarray]:
    """Return sorted indices of the training part and of the 20% of every class that is held out.

    They are drawn by numpy's legacy generator, whose stream is promised never to change.
    """
    draw = np.random.RandomState(seed)
    held_out = [
        draw.permutation(rows)[: round(HELD_OUT * len(rows))]
        for rows in (np.flatnonzero(labels == label) for label in np.unique(labels))
    ]
    held = np.sort(np.concatenate(held_out))
    return np.setdiff1d(np.arange(len(labels)), held), held


def train(
    grey: Tensor,
    labels: Tensor,
    *,
    seed: int = 0,
    epochs: int = EPOCHS,
    on_epoch: Callable[[int, float], None] = lambda epoch, loss: None,
) -> DigitClassifier:
    """Train from scratch with AdamW and a cosine decay; return the network in eval mode.

    Args:
        grey: float32 of shape (n, 1, 32, 32) in [-1, 1].
        labels: int64 of shape (n,).
        seed: seed of the initial weights, the order and the augmentation; the state of the global
            generator is kept.
        epochs: passes over the data.
        on_epoch: called with the epoch (1-based) and its mean loss.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = epochs * -(-len(grey) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(1, epochs + 1):
        total = 0.0
        for rows in torch.randperm(len(grey), generator=generator).split(BATCH_SIZE):
            logits = model(_augment(grey[rows], generator))
            loss = functional.cross_entropy(logits, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows)
        on_epoch(epoch, total / len(grey))
    set_unit_variance(model, grey)
    return model.eval()


def _augment(grey: Tensor, generator: torch.Generator) -> Tensor:
    """Shift, turn and scale every image by small random amounts of its own."""
    n = len(grey)
    angle, scaling, shift_x, shift_y = torch.rand(4, n, generator=generator) * 2 - 1
    angle = torch.deg2rad(angle * MAX_ROTATION)
    scale = 1 + scaling * MAX_SCALING
    cos, sin = angle.cos() * scale, angle.sin() * scale
    pixel = 2 / SIZE  # the grid runs from -1 to 1
    shift_x, shift_y = shift_x * MAX_SHIFT * pixel, shift_y * MAX_SHIFT * pixel
    theta = torch.stack([cos, -sin, shift_x, sin, cos, shift_y], dim=1).view(n, 2, 3)
    grid = functional.affine_grid(theta, list(grey.shape), align_corners=False)
    return functional.grid_sample(grey, grid, padding_mode="border", align_corners=False)


@torch.no_grad()
def set_unit_variance(model: DigitClassifier, grey: Tensor) -> None:
    """Rescale every feature to unit variance over ``grey`` without changing the logits.

    ReLU(x / s) * s = ReLU(x) for s > 0, so the deviation moves from the bottleneck to the head.
    This gives distances a unit: the features of real digits have a total variance of 64.
    """
    deviation = model.features(grey).std(dim=0)
    model.bottleneck.weight.div_(deviation[:, None])
    model.bottleneck.bias.div_(deviation)
    model.head.weight.mul_(deviation)


@torch.no_grad()
def accuracy(model: DigitClassifier, grey: Tensor, labels: Tensor) -> float:
    """Return the share of images whose largest logit is their label's."""
    return (model(grey).argmax(dim=1) == labels).double().mean().item()


def write_weights(path: Path, model: DigitClassifier, metadata: dict[str, Any]) -> None:
    """Write the weights and ``metadata`` as safetensors.

    The metadata is one entry of sorted JSON: safetensors writes several entries in a random order,
    and equal content should make an equal file.
    """
    text = json.dumps(metadata, sort_keys=True)
    write_bytes(path, save(model.state_dict(), metadata={METADATA_KEY: text}), AGAIN)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train on 80% of the digits, report the accuracy on the rest, and write the weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True, help="safetensors to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    options = parser.parse_args(arguments)
    if options.epochs < 1:
        parser.error(f"--epochs is {options.epochs}, expected at least 1")
    if options.output.exists() and not options.overwrite:
        parser.error(f"{options.output} exists; name another file or add --overwrite")
    if not options.output.parent.is_dir():
        parser.error(f"{options.output.parent} is not a folder; create it first")

    images, classes = digits()
    grey, labels = to_grey(images), torch.from_numpy(classes.copy())
    train_rows, held_rows = split(classes)

    def report(epoch: int, loss: float) -> None:
        print(f"epoch {epoch}/{options.epochs}  loss {loss:.4f}", flush=True)

    model = train(
        grey[train_rows],
        labels[train_rows],
        seed=options.seed,
        epochs=options.epochs,
        on_epoch=report,
    )
    held_out_accuracy = accuracy(model, grey[held_rows], labels[held_rows])
    print(f"held-out accuracy {held_out_accuracy:.4f} of {len(held_rows)}")
    sizes = {"seed": SPLIT_SEED, "train": len(train_rows), "held_out": len(held_rows)}
    metadata = {
        "name": NAME,
        "version": VERSION,
        "seed": options.seed,
        "epochs": options.epochs,
        "accuracy": held_out_accuracy,
        "split": sizes,
    }
    write_weights(options.output, model, metadata)


if __name__ == "__main__":
    torch.set_num_threads(1)  # more threads add in another order and change the last bits
    main()
