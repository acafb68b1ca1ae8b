"""Published results as data: what a table compares, with which settings, and its figures.

One TOML file for each table, under ``recipes/published`` of the sources and ``accelkit/recipes`` of
an installed package. :mod:`accelkit.jobs.reproduce` runs them.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelkit.errors import AccelkitError
from accelkit.fields import from_table

SCALES = ("full", "digits")
"""As published, and in miniature on the digits."""
_PLACES = (
    Path(__file__).parents[1] / "recipes",
    Path(__file__).parents[2] / "recipes" / "published",
)
_NEEDED = {"method", "sampler", "steps", "fid"}
# A report shows these of a published row; a recipe may hold more.
_REPORTED = ("method", "sampler", "steps", "fid", "fid_std", "saving", "setting")


@dataclass(frozen=True)
class Experiment:
    """How a table is run, as published or in miniature.

    Attributes:
        methods: rows, as ``accelkit bench`` takes them; the first is full depth.
        samplers: samplers with their steps, ``ddim:50``.
        images: images per row and sampler.
        batch_size: images made at once.
        timing_batch_size: images of a timed call.
        rounds: timed calls.
        guidance: guidance scale, 1 for none.
        guidance_channels: guided latent channels, 0 for all.
        model: the model; "" if the user names it or it is trained from scratch.
        data: the images; "" if the user names them.
        vae: autoencoder of a network trained from scratch; ``builtin`` for the built-in model's.
        flip: whether mirrored images are trained on as well.
        process: ``vp-sde`` to sample a network trained from scratch by the continuous process, ""
            for the process of its training.
        tuned: methods with weights trained for their schedule.
        training: settings of that training, a :class:`accelkit.train.config.TrainConfig`.
        from_scratch: whether these weights are trained from scratch rather than fine-tuned.
        network: sizes of a network trained from scratch, a
            :class:`accelkit.jobs.settings.ModelConfig`; by default the published ones.
        base: settings of the training of the model itself, if it is trained; with
            ``from_scratch``, those that differ from ``training``.
        variants: settings that differ between the trainings compared, by name.
    """

    methods: tuple[str, ...]
    samplers: tuple[str, ...]
    images: int
    batch_size: int
    timing_batch_size: int = 32
    rounds: int = 7
    guidance: float = 1.0
    guidance_channels: int = 0
    model: str = ""
    data: str = ""
    vae: str = ""
    flip: bool = False
    process: str = ""
    tuned: tuple[str, ...] = ()
    training: Mapping[str, Any] = field(default_factory=dict)
    from_scratch: bool = False
    network: Mapping[str, Any] = field(default_factory=dict)
    base: Mapping[str, Any] = field(default_factory=dict)
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if strange := set(self.tuned) - set(self.methods):
            raise AccelkitError(f"tuned methods that are not compared: {', '.join(strange)}")


@dataclass(frozen=True)
class Cost:
    """Counted figures, which need neither weights nor data.

    Attributes:
        rows: rows of a ``method`` or a ``depth``, with ``gmacs`` of a call (10^9
            multiply-accumulates, a mean over noise levels), the share saved (``saving``) or the
            ``depths`` of a schedule from noise to data.
        attention: whether the products of attention are counted.
        tolerance: largest deviation of a count: relative for ``gmacs``, absolute for ``saving``.
    """

    rows: tuple[Mapping[str, Any], ...]
    attention: bool = True
    tolerance: float = 0.0


@dataclass(frozen=True)
class Publication:
    """A table of a paper.

    Attributes:
        name: name of the recipe, e.g. ``ase-table3``.
        title: what the table compares.
        paper: authors or method, and year.
        work: title, venue and year.
        needs: what a user has to give, in a line.
        network: the published network: sizes of a DiT, or ``released``, a U-ViT's name.
        table: the table's number in the paper, "" if unknown.
        notes: remarks of a sentence or two each.
        full: how the table was run; None for a table of counted costs alone.
        digits: the same in miniature on the digits, if there is a miniature.
        setting: model, data and number of images of the figures.
        figures: published rows: method, sampler, steps, fid and whatever else is known.
        missing: the part of the table that ``figures`` lacks, "" for nothing.
        cost: the counted figures, if there are any.
    """

    name: str
    title: str
    paper: str
    work: str
    needs: str
    network: Mapping[str, Any]
    table: str = ""
    notes: tuple[str, ...] = ()
    full: Experiment | None = None
    digits: Experiment | None = None
    setting: str = ""
    figures: tuple[Mapping[str, Any], ...] = ()
    missing: str = ""
    cost: Cost | None = None

    @property
    def source(self) -> str:
        """Paper and table as a report cites them; the title if the number is unknown."""
        return f"{self.paper}, " + (f"table {self.table}" if self.table else self.title)

    def experiment(self, scale: str) -> Experiment:
        """Return how the table is run at a scale of :data:`SCALES`.

        Raises:
            AccelkitError: it is not run at that scale.
        """
        check_scale(scale)
        if self.full is None:
            raise AccelkitError(f"{self.name} is a table of counted costs; nothing is run")
        found = self.full if scale == "full" else self.digits
        if found is None:
            raise AccelkitError(f"{self.name} has no miniature; run it with --scale full")
        return found

    def published(self, variant: str = "") -> list[dict[str, Any]]:
        """Return the figures of a variant of the training, as rows of a report's ``published``."""
        rows = []
        for figure in self.figures:
            if figure.get("variant", variant) == variant:
                row = {key: figure.get(key) for key in _REPORTED}
                settings = (self.setting, figure.get("setting"))
                row["setting"] = ", ".join(part for part in settings if part)
                rows.append({"source": self.source, **row})
        return rows


def names() -> tuple[str, ...]:
    """Return the names of all publications, sorted."""
    return tuple(sorted(path.stem for path in _folder().glob("*.toml")))


def check_scale(scale: str) -> None:
    """Raise AccelkitError for a scale that is not one of :data:`SCALES`."""
    if scale not in SCALES:
        raise AccelkitError(f"a scale is {' or '.join(SCALES)}, got {scale!r}")


def publication(name: str) -> Publication:
    """Return the publication of that name; AccelkitError if there is none."""
    known = names()
    if name not in known:
        near = difflib.get_close_matches(name.lower(), known, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else f"known are {', '.join(known)}"
        raise AccelkitError(f"no reproduction is called {name!r}; {hint}")
    return read_publication(_folder() / f"{name}.toml")


def read_publication(path: Path) -> Publication:
    """Return the publication of a TOML file.

    Raises:
        AccelkitError: it cannot be read, or a setting is unknown, missing or of the wrong type.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        figures = content.pop("figures", {})
        if unknown := set(figures) - {"rows", "setting", "missing"}:
            raise AccelkitError(f"unknown settings in [figures]: {', '.join(unknown)}")
        for row in (rows := figures.pop("rows", [])):
            if missing := _NEEDED - set(row):
                raise AccelkitError(f"a row lacks {', '.join(sorted(missing))}: {row}")
        for table, kind in (("full", Experiment), ("digits", Experiment), ("cost", Cost)):
            if table in content:
                content[table] = from_table(kind, content[table], table)
        notes = re.split(r"^- ", content.pop("notes", ""), flags=re.MULTILINE)
        return Publication(
            name=path.stem,
            notes=tuple(" ".join(note.split()) for note in notes if note.strip()),
            figures=tuple(rows),
            **figures,
            **content,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AccelkitError(f"cannot read the publication {path}: {error}") from error


def _folder() -> Path:
    found = next((place for place in _PLACES if place.is_dir()), None)
    if found is None:
        raise AccelkitError(
            f"the published recipes are missing at {_PLACES[0]}; install accelkit again"
        )
    return found
