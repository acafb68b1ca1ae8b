"""The settings of jobs: model and data, the place of a run, the sizes of an untrained network."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from pathlib import Path

from accelkit.assets import BUILTIN
from accelkit.errors import AccelkitError
from accelkit.fields import (
    DATA,
    ESSENTIAL,
    MODEL,
    NOT_NEGATIVE,
    OUTPUT,
    check,
    one_of,
    setting,
    size,
)
from accelkit.files.documents import is_utf8
from accelkit.models.sizes import MOST, MOST_LAYERS

FAMILIES = ("dit", "uvit")
"""Families that can be trained from scratch."""


@dataclass(frozen=True)
class Source:
    """The model and the data of a job.

    An empty ``data`` means that no data is named; a job opens none.
    """

    model: str = setting(
        BUILTIN,
        "Model: builtin, a pipeline's directory, an original-layout file or a hub id",
        ESSENTIAL,
    )
    data: str = setting(
        "digits",
        "Images: digits (of the built-in model), a folder (by class or with captions), or a zip of "
        "one",
        ESSENTIAL,
    )
    revision: str | None = setting(None, "Branch, tag or commit of a hub id", MODEL)
    vae: str | None = setting(
        None, "Autoencoder of an original-layout file: a directory or hub id", MODEL
    )
    num_heads: int | None = setting(
        None,
        "Attention heads of an original-layout file; 0 for those published",
        MODEL,
        rule=NOT_NEGATIVE,
        zero_is_none=True,
    )
    skip_bad: bool = setting(False, "Unreadable images skipped and counted", DATA)
    flip: bool = setting(False, "Mirrored images as additional training data", DATA)
    variant: str | None = setting(None, "Variant of the model's weights, such as fp16", MODEL)
    class_map: str | None = setting(
        None,
        'File with the labels of the data\'s classes: a JSON object such as {"cat": 3, "dog": 5}, '
        "or the names of all the model's classes, one a line; by default 0, 1, … in the order of "
        "the names",
        DATA,
        metavar="FILE",
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Run:
    """The directory of a run, and what it writes there on the way."""

    output: Path = setting(MISSING, "Output directory", ESSENTIAL, flags="-o --output")
    resume: bool = False
    overwrite: bool = setting(False, "Results of an earlier run replaced", OUTPUT)
    checkpoint_every: int = setting(
        100, "Steps between checkpoints; 0 for one at the end", OUTPUT, rule=NOT_NEGATIVE
    )
    keep: int = setting(
        2,
        "Number of newest checkpoints kept; 0 for all",
        OUTPUT,
        flags="--checkpoints-kept",
        rule=NOT_NEGATIVE,
    )
    preview_every: int = setting(
        0, "Steps between grids of preview images; 0 for none", OUTPUT, rule=NOT_NEGATIVE
    )
    report_to: str | None = setting(
        None, "Experiment tracker of accelerate: tensorboard, wandb, …", OUTPUT
    )

    def __post_init__(self) -> None:
        check(self)
        check_output(self.output)


def check_output(path: Path) -> None:
    """Raise AccelkitError for a directory from which safetensors could not read the weights."""
    if not is_utf8(path):
        raise AccelkitError(
            f"the path of the output {path} is not UTF-8, and safetensors reads from no other; "
            "give another -o"
        )


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of a denoiser in an autoencoder's latents, on linear betas.

    diffusers' own DiT pipeline guides with 1000 classes only.

    Raises:
        AccelkitError: another family, a size out of range, or an odd number of blocks besides a
            U-ViT's middle one.
    """

    family: str = setting("dit", "Family: dit (with learned sigma) or uvit", rule=one_of(*FAMILIES))
    image_size: int = setting(32, "Height and width of the images in pixels", rule=size(MOST))
    layers: int = setting(28, "Blocks, besides a U-ViT's middle one", rule=size(MOST_LAYERS))
    heads: int = setting(4, "Attention heads", rule=size(MOST))
    head_dim: int = setting(16, "Width of an attention head", rule=size(MOST))
    patch_size: int = setting(2, "Height and width of a patch of latents", rule=size(MOST))
    num_classes: int = setting(1000, "Classes, without the null class", rule=size(MOST))

    def __post_init__(self) -> None:
        check(self, "; see [model]")
        if self.family == "uvit" and (self.layers < 2 or self.layers % 2):
            raise AccelkitError(
                f"layers = {self.layers}; a U-ViT has as many decoder blocks as encoder blocks "
                "besides its middle one, so give an even number, at least 2"
            )

    @property
    def depth(self) -> int:
        """How many blocks a schedule counts."""
        return self.layers // 2 if self.family == "uvit" else self.layers
