"""The one idea: a schedule maps the noise level to what a network call may spend."""

from __future__ import annotations

import math
import os.path
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accelkit.compute import Compute, Merge, split_knobs
from accelkit.errors import AccelkitError
from accelkit.files.documents import read_json, read_toml
from accelkit.preset_names import (
    SEQUENTIAL,
    families,
    is_preset,
    least_depth,
    make_preset,
    preset_family,
)


@dataclass(frozen=True, slots=True)
class Schedule:
    """A piecewise-constant map from noise level to :class:`Compute`.

    The noise level t runs from 0 (data) to 1 (noise) on the linear-beta variance-preserving axis
    of :mod:`accelkit.noise.axis`. Interval i is ``[edges[i-1], edges[i])``; the first starts at 0
    and the last is closed. Neighbours of equal compute are merged, so two schedules that do the
    same are equal. The name is not compared.

    Attributes:
        edges: upper ends of the intervals, rising; the last is 1.
        computes: the compute of each interval.
        layers: the model's number of counted blocks, the depth of a full call.
        name: the text that the schedule was made from, e.g. ``"D4"``.
        family: the family whose blocks are counted, e.g. ``"uvit"``; empty for all blocks in order.
    """

    edges: tuple[float, ...]
    computes: tuple[Compute, ...]
    layers: int
    name: str = field(default="", compare=False)
    family: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.layers, bool) or not isinstance(self.layers, int):
            raise TypeError(f"layers is the model's number of blocks, not {self.layers!r}")
        if self.layers < 1:
            raise AccelkitError(
                f"layers is the model's number of blocks, at least 1, not {self.layers}"
            )
        edges, computes = tuple(float(e) for e in self.edges), tuple(self.computes)
        if not edges or len(edges) != len(computes):
            raise AccelkitError(
                f"a schedule needs one upper edge per interval, got {len(edges)} edges for "
                f"{len(computes)} intervals"
            )
        if not all(low < high for low, high in zip((0.0, *edges), edges, strict=False)):
            shown = ", ".join(f"{e:g}" for e in edges)
            raise AccelkitError(f"the edges of a schedule must rise from above 0, got {shown}")
        if edges[-1] != 1:
            raise AccelkitError(
                f"the last edge of a schedule must be 1 (pure noise), got {edges[-1]:g}"
            )
        for compute in computes:
            if compute.depth > self.layers:
                raise AccelkitError(
                    f"depth {compute.depth} is above the model's {self.layers} blocks; "
                    f"give none above {self.layers}"
                )
        keep = [i for i in range(len(edges)) if computes[i : i + 1] != computes[i + 1 : i + 2]]
        object.__setattr__(self, "edges", tuple(edges[i] for i in keep))
        object.__setattr__(self, "computes", tuple(computes[i] for i in keep))

    @classmethod
    def parse(cls, text: str | Path, depth: int = 28, family: str = "dit") -> Schedule:
        """Read a schedule for a model of ``depth`` blocks.

        Args:
            text: a preset (``"D4"``, or ``"dvd-4p"`` for any family), ``"full"``, ``"uniform:K"``,
                a literal of depths at upper edges (``"28@0.2,24@0.4,20@0.6,16@0.8,12@1"``) or the
                path of a TOML or JSON file of :meth:`to_dict`'s form. The depths of a literal are
                absolute; presets and files made for another depth are scaled (:meth:`rescaled`).
                Knobs follow a ``+`` and apply at every noise level: ``"D4+tome:0.3"`` merges
                tokens as well (:class:`accelkit.compute.Merge`), ``"tome:0.3"`` at full depth.
            depth: the model's number of blocks.
            family: the backbone family whose presets are meant.

        Raises:
            AccelkitError: an unknown name, a malformed literal or file, a depth the model lacks.
        """
        if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
            raise AccelkitError(f"depth is the model's number of blocks, at least 1, not {depth!r}")
        word = str(text).strip()
        counted = preset_family(family)
        whole, knobs = split_knobs(word)
        schedule = cls._read(whole or ("full" if knobs else ""), depth, counted)
        if knobs:
            computes = tuple(replace(compute, **knobs) for compute in schedule.computes)
            schedule = replace(schedule, computes=computes, name=word)
        if (least := least_depth(counted)) > schedule.depths[0]:
            raise AccelkitError(f"depth {schedule.depths[0]} runs no block; the least is {least}")
        return replace(schedule, family="" if counted == SEQUENTIAL else counted)

    @classmethod
    def _read(cls, word: str, depth: int, family: str) -> Schedule:
        if word.lower() == "full":
            return cls.uniform(depth, depth, name="full")
        if match := re.fullmatch(r"uniform:(-?\d{1,9})", word, re.IGNORECASE):
            return cls.uniform(int(match[1]), depth, name=word)
        if Path(word).suffix.lower() in {".toml", ".json"}:
            stored = cls.load(word)
            if stored.family not in ("", family):
                raise AccelkitError(
                    f"the schedule in {word} counts blocks of the {stored.family} family, this is "
                    f"a {family}; name one for it"
                )
            return stored.rescaled(depth)
        if "@" in word:
            return cls._literal(word, depth)
        return make_preset(word, family, depth)

    @classmethod
    def uniform(cls, depth: int, layers: int, name: str = "") -> Schedule:
        """Return the schedule that runs ``depth`` of ``layers`` blocks at every noise level."""
        return cls((1.0,), (Compute(depth),), layers, name or f"uniform:{depth}")

    @classmethod
    def _literal(cls, text: str, layers: int) -> Schedule:
        pairs = [part.partition("@") for part in text.split(",")]
        try:
            edges = tuple(float(edge) for _, _, edge in pairs)
            computes = tuple(Compute.parse(spent) for spent, _, _ in pairs)
            if not all(map(math.isfinite, edges)):
                raise ValueError("an edge is no finite number")
        except AccelkitError:
            raise
        except ValueError:
            raise AccelkitError(
                f"cannot read the schedule {text!r}; write depth@upper-edge pairs, "
                "e.g. 28@0.2,24@0.4,20@0.6,16@0.8,12@1"
            ) from None
        return cls(edges, computes, layers, text)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Schedule:
        """Return the schedule of plain data in :meth:`to_dict`'s form.

        Raises:
            AccelkitError: keys are unknown or missing, or values are not what they should be.
        """
        optional = {"name", "family"}
        if not isinstance(data, dict) or set(data) - optional != {"layers", "intervals"}:
            raise AccelkitError(
                "a schedule is a table with 'layers', 'intervals' and optionally 'name', got "
                f"{sorted(map(str, data)) if isinstance(data, dict) else type(data).__name__}"
            )
        try:
            rows = [dict(row) for row in data["intervals"]]
            edges = tuple(float(row.pop("until")) for row in rows)
            computes = tuple(map(Compute.from_dict, rows))
            named = (str(data.get(key, "")) for key in ("name", "family"))
            return cls(edges, computes, data["layers"], *named)
        except AccelkitError:
            raise
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise AccelkitError(
                f"each interval of a schedule holds 'until' and 'depth', numbers both ({error})"
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """Return plain data: ``name``, ``layers`` and ``intervals`` of ``until`` and ``depth``."""
        rows = zip(self.edges, self.computes, strict=True)
        intervals = [{"until": edge, **compute.to_dict()} for edge, compute in rows]
        family = {"family": self.family} if self.family else {}
        return {"name": self.name, "layers": self.layers, **family, "intervals": intervals}

    @classmethod
    def load(cls, path: str | Path) -> Schedule:
        """Read a TOML or JSON file that holds :meth:`to_dict`'s form."""
        path = Path(path)
        if not os.path.exists(path):  # also where the name is too long for one
            raise AccelkitError(f"no schedule file at {path}")
        what = "the schedule file"
        toml = path.suffix.lower() == ".toml"
        content = read_toml(path, what) if toml else read_json(path, what)
        try:
            return cls.from_dict(content)
        except AccelkitError as error:
            raise AccelkitError(f"cannot read {what} {path}: {error}") from error

    def rescaled(self, layers: int) -> Schedule:
        """Return the schedule for a model of ``layers`` blocks: equal fractions, halves up.

        A depth of at least 1 stays at least 1.
        """
        if layers == self.layers:
            return self
        depths = ((2 * c.depth * layers + self.layers) // (2 * self.layers) for c in self.computes)
        computes = tuple(
            replace(c, depth=max(min(1, c.depth), d))
            for c, d in zip(self.computes, depths, strict=True)
        )
        return replace(self, computes=computes, layers=layers)

    def at(self, t: float) -> Compute:
        """Return the compute at noise level ``t`` in [0, 1]."""
        if not 0 <= t <= 1:
            raise AccelkitError(f"a noise level is between 0 (data) and 1 (noise), got {t!r}")
        return self.computes[bisect_right(self.edges, t, hi=len(self.edges) - 1)]

    def depth_at(self, t: float) -> int:
        """Return the number of blocks run at noise level ``t`` in [0, 1]."""
        return self.at(t).depth

    @property
    def full(self) -> bool:
        """Whether every noise level runs all blocks and nothing is saved."""
        return self.computes == (Compute(self.layers),)

    @property
    def plain(self) -> bool:
        """Whether only the depth varies, with no knob set at any noise level."""
        return not any(compute.knobs for compute in self.computes)

    @property
    def depths(self) -> tuple[int, ...]:
        """The distinct depths, rising."""
        return tuple(sorted({c.depth for c in self.computes}))

    @property
    def merges(self) -> tuple[Merge, ...]:
        """The distinct ways in which tokens are merged."""
        return tuple(dict.fromkeys(c.merge for c in self.computes if c.merge is not None))

    def mean(
        self, of: Callable[[Compute], float], timesteps: Iterable[float] | None = None
    ) -> float:
        """Return the mean of a function of the compute, e.g. its cost.

        Args:
            of: maps a compute to a number.
            timesteps: noise levels in [0, 1], or whole timesteps of the 1,000-step linear-beta
                process (then any of them is above 1), as a sequence or tensor. None takes the
                exact integral over evenly spread noise levels, which is the cost of training.
                Convert the timesteps of another process first, by
                :meth:`accelkit.noise.axis.NoiseAxis.levels`.
        """
        if timesteps is None:
            widths = (b - a for a, b in zip((0.0, *self.edges), self.edges, strict=False))
            return sum(w * of(c) for w, c in zip(widths, self.computes, strict=True))
        levels = [float(t) for t in getattr(timesteps, "tolist", lambda: timesteps)()]
        if not levels:
            raise AccelkitError("a mean over timesteps needs at least one, got none")
        if max(levels) > 1 and all(t.is_integer() for t in levels):
            levels = [t / 1000 for t in levels]
        return sum(of(self.at(t)) for t in levels) / len(levels)

    def mean_depth(self, timesteps: Iterable[float] | None = None) -> float:
        """Return the mean depth, over ``timesteps`` as in :meth:`mean`."""
        return self.mean(lambda compute: compute.depth, timesteps)

    def ideal_saving(
        self,
        timesteps: Iterable[float] | None = None,
        cost: Callable[[Compute], float] | None = None,
    ) -> float:
        """Return the share of a full call's cost that is saved, from 0 to 1.

        Args:
            timesteps: as in :meth:`mean`.
            cost: the cost of a compute, in any unit. Default: its depth, which is right if all
                blocks are counted and cost the same.
        """
        cost = cost or (lambda compute: compute.depth)
        return 1 - self.mean(cost, timesteps) / cost(Compute(self.layers))

    def __str__(self) -> str:
        rows = zip(self.computes, self.edges, strict=True)
        return ",".join(f"{compute}@{edge:g}" for compute, edge in rows)


def check_readable(text: str) -> None:
    """Raise AccelkitError for a text that is a schedule of no model.

    Depths and options of a preset are not checked: they depend on the model's number of blocks.
    """
    if is_preset(text):
        return
    refused = []
    for family in families():
        try:
            Schedule.parse(text, _ANY_DEPTH, family)
            return
        except AccelkitError as error:
            refused.append(error)
    raise refused[0]


_ANY_DEPTH = 1_000_000
