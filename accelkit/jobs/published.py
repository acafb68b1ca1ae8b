"""Published results as data: what was compared, with which settings, and the figures.

One TOML file for each table, under ``recipes/published`` of the sources and ``accelkit/recipes`` of
an installed package. :mod:`accelkit.jobs.reproduce` runs them.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from accelkit.errors import AccelkitError

SCALES = ("full", "digits")
"""As published, and in miniature on the digits."""
_PLACES = (
    Path(__file__).parents[1] / "recipes",
    Path(__file__).parents[2] / "recipes" / "published",
)
# What a report has of a published row; a recipe may hold more of it.
_REPORTED = ("method", "sampler", "steps", "fid", "fid_std", "saving", "setting")


@dataclass(frozen=True)
class Experiment:
    """How a table is run, as published or in miniature.

    Attributes:
        methods: rows, as ``accelkit bench`` takes them; the first is full depth.
        samplers: each with its steps, ``ddim:50``.
        images: per row and sampler.
        batch_size: images made at once.
        timing_batch_size: images of a timed call.
        rounds: of timing.
        guidance: scale, 1 for none.
        guidance_channels: latent channels that are guided, 0 for all.
        model: the model, "" where the user names it or it is trained from scratch.
        data: the images, "" where the user names them.
        vae: autoencoder of a network that is trained from scratch; ``builtin`` for that of the
            built-in model.
        flip: train on mirrored images as well.
        process: ``vp-sde`` to sample a network trained from scratch by the continuous process, ""
            for the one it was trained on.
        tuned: methods whose weights are trained for their schedule.
        training: how, settings of :class:`accelkit.train.config.TrainConfig`.
        from_scratch: they are trained from scratch, else fine-tuned from the model.
        network: sizes of the network that is trained from scratch,
            :class:`accelkit.jobs.fresh.ModelConfig`; of the published scale, those of the table.
        base: how the model itself is trained, if it is; where all are from scratch, what differs
            from ``training``.
        variants: by name, what differs between trainings that are compared; none is one training.
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


@dataclass(frozen=True)
class Cost:
    """Figures that are counted, which takes neither weights nor data.

    Attributes:
        rows: of a ``method`` or a ``depth`` each, with ``gmacs`` of a call (10^9
            multiply-accumulates, a mean over noise levels), the share saved (``saving``) or the
            ``depths`` of a schedule from noise to data.
        attention: whether they count the products of attention.
        tolerance: how far a count may be off: relative for ``gmacs``, absolute for ``saving``.
    """

    rows: tuple[Mapping[str, Any], ...]
    attention: bool = True
    tolerance: float = 0.0


@dataclass(frozen=True)
class Publication:
    """A table of a paper.

    Attributes:
        name: the recipe's, e.g. ``ase-table3``.
        title: what it compares.
        paper: authors or method and year.
        work: title, venue and year.
        table: its number in the paper, "" where that is not known.
        needs: what a user has to give, in a line.
        notes: what to mind, a sentence or two each.
        network: the published network: sizes of a DiT, or ``released``, a U-ViT's name.
        full: how it was run; None for a table of counted costs alone.
        digits: the same in miniature on the digits; None for none.
        setting: model, data and number of images of the figures.
        figures: published rows: method, sampler, steps, fid and what else is known.
        missing: what of the table is not among them, "" for nothing.
        cost: counted figures, None for none.
    """

    name: str
    title: str
    paper: str
    work: str
    table: str
    needs: str
    notes: tuple[str, ...]
    network: Mapping[str, Any]
    full: Experiment | None
    digits: Experiment | None
    setting: str
    figures: tuple[Mapping[str, Any], ...]
    missing: str
    cost: Cost | None

    @property
    def source(self) -> str:
        """Paper and table as a report cites them; the title where the number is not known."""
        return f"{self.paper}, " + (f"table {self.table}" if self.table else self.title)

    def experiment(self, scale: str) -> Experiment:
        """Return how it is run at a scale of :data:`SCALES`.

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
        """Return the figures as rows of a report's ``published``.

        Args:
            variant: of the training, "" where there is one.
        """
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
    """Raise AccelkitError for what is none of :data:`SCALES`."""
    if scale not in SCALES:
        raise AccelkitError(f"a scale is {' or '.join(SCALES)}, got {scale!r}")


def publication(name: str) -> Publication:
    """Return the publication of that name.

    Raises:
        AccelkitError: there is none.
    """
    known = names()
    if name not in known:
        near = difflib.get_close_matches(name.lower(), known, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else f"known are {', '.join(known)}"
        raise AccelkitError(f"no reproduction is called {name!r}; {hint}")
    return read_publication(_folder() / f"{name}.toml")


def read_publication(path: Path) -> Publication:
    """Return the publication of a TOML file.

    Raises:
        AccelkitError: it cannot be read, or has settings unknown, missing or of the wrong kind.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        figures = content.pop("figures", {})
        notes = re.split(r"^- ", content.pop("notes", ""), flags=re.MULTILINE)
        read = Publication(
            name=path.stem,
            notes=tuple(" ".join(note.split()) for note in notes if note.strip()),
            table=content.pop("table", ""),
            network=content.pop("network"),
            full=_experiment(content, "full"),
            digits=_experiment(content, "digits"),
            setting=figures.pop("setting", ""),
            figures=_rows(figures.pop("rows", []), {"method", "sampler", "steps", "fid"}),
            missing=figures.pop("missing", ""),
            cost=_cost(content.pop("cost", None)),
            **content,
        )
        if figures:
            raise AccelkitError(f"unknown settings in [figures]: {', '.join(figures)}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AccelkitError(f"cannot read the publication {path}: {error}") from error
    return read


def _folder() -> Path:
    found = next((place for place in _PLACES if place.is_dir()), None)
    if found is None:
        raise AccelkitError(
            f"the published recipes are missing at {_PLACES[0]}; install accelkit again"
        )
    return found


def _experiment(content: dict[str, Any], scale: str) -> Experiment | None:
    table = content.pop(scale, None)
    if table is None:
        return None
    if unknown := sorted(set(table) - {f.name for f in fields(Experiment)}):
        raise AccelkitError(f"unknown settings in [{scale}]: {', '.join(unknown)}")
    tuples = {name: tuple(value) for name, value in table.items() if isinstance(value, list)}
    made = Experiment(**table | tuples)
    if strange := set(made.tuned) - set(made.methods):
        raise AccelkitError(f"tuned methods of [{scale}] that are none: {', '.join(strange)}")
    return made


def _cost(table: dict[str, Any] | None) -> Cost | None:
    if table is None:
        return None
    return Cost(_rows(table.pop("rows"), set()), **table)


def _rows(rows: Any, needed: set[str]) -> tuple[Mapping[str, Any], ...]:
    for row in rows:
        if missing := needed - set(row):
            raise AccelkitError(f"a row lacks {', '.join(sorted(missing))}: {row}")
    return tuple(rows)
