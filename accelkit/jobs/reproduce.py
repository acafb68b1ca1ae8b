"""Reproduces a published comparison: trains the models it needs, then runs one bench over all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accelkit.artifact import artifact
from accelkit.artifact.loading import open_pipeline
from accelkit.assets import BUILTIN, builtin
from accelkit.bench.protocol import Protocol
from accelkit.errors import AccelkitError, Stopped
from accelkit.files.writing import AGAIN
from accelkit.jobs.bench import bench
from accelkit.jobs.finetune import finetune
from accelkit.jobs.fresh import ModelConfig
from accelkit.jobs.outputs import save_pipeline
from accelkit.jobs.published import Experiment, Publication
from accelkit.jobs.reporter import Reporter
from accelkit.jobs.scratch import PIPELINE, scratch
from accelkit.jobs.settings import Run, Source
from accelkit.runtime.switch import enable
from accelkit.sample.generate import check_seed
from accelkit.sample.many import World
from accelkit.train.autoencoder import AutoencoderConfig
from accelkit.train.config import TrainConfig
from accelkit.train.rundir import RunDirectory

BASE, TRAINING, CONTINUOUS = "base", "training", "continuous"
_CHECKPOINTS = 50  # of a whole training, but at least every 100 steps


@dataclass(frozen=True)
class Given:
    """What a user brings to a reproduction besides model and data.

    Attributes:
        tuned: directories of artifacts by the schedules that they are tuned for; weights for other
            schedules are trained.
        kernels: as for :func:`accelkit.enable`.
        features, features_sha256, reference: as in :class:`accelkit.bench.protocol.Protocol`.
        seed: seed of all trainings; another seed also has other seeds for its images.
    """

    tuned: Mapping[str, str] = field(default_factory=dict)
    kernels: str = "auto"
    features: str | None = None
    features_sha256: str | None = None
    reference: str | None = None
    seed: int = 0


def reproduce(
    publication: Publication,
    scale: str,
    source: Source,
    given: Given,
    output: Path,
    reporter: Reporter,
) -> dict[str, dict[str, Any]]:
    """Train the missing weights, compare, and return the results by variant of the training.

    Weights go to ``OUTPUT/SCHEDULE`` (a base model trained first goes to ``OUTPUT/base``) and
    results to ``OUTPUT``. If variants of a training are compared, each has a directory of its own
    in ``OUTPUT``. Finished work is not repeated.

    Args:
        scale: ``full`` or ``digits``.
        source: model and data, "" for those of the publication; the autoencoder is that of an
            original-layout file, or of models trained from scratch.
        given: existing weights, and how images are judged.

    Raises:
        AccelkitError: a required input is missing, or an input does not fit.
        accelkit.errors.Stopped: a signal ended a training; the same call continues it.
    """
    World.launched()
    experiment = publication.experiment(scale)
    source = _named(publication, experiment, source, given)
    plan = _plan(experiment, given)
    work = _Work(publication, experiment, source, given.seed, output, reporter)
    try:
        base = work.base()
        results = {}
        for variant, change in (experiment.variants or {"": {}}).items():
            tuned = dict(given.tuned)
            for schedule in experiment.tuned:
                if schedule not in tuned:
                    tuned[schedule] = str(output / variant / schedule)
                    work.train(base, schedule, change, Path(tuned[schedule]))
            World.launched().wait()  # the main process writes the weights
            results[variant] = bench(
                base,
                plan,
                output / variant,
                reporter,
                tuned=tuned,
                published=publication.published(variant),
            )
    except Stopped:
        reporter.say("give the same accelkit reproduce again to go on")
        raise
    return results


def _named(
    publication: Publication, experiment: Experiment, source: Source, given: Given
) -> Source:
    """Return model and data, completed by the publication; AccelkitError if they do not fit."""
    source = replace(
        source,
        model=source.model or experiment.model,
        data=source.data or experiment.data,
        flip=source.flip or experiment.flip,
    )
    trains = bool(experiment.network) or experiment.from_scratch
    for name, missing in (("data", not source.data), ("model", not source.model and not trains)):
        if missing:
            small = "; or run its miniature with --scale digits" if publication.digits else ""
            raise AccelkitError(
                f"{publication.name} needs --{name} (it takes {publication.needs}){small}"
            )
    if strange := sorted(set(given.tuned) - set(experiment.tuned)):
        raise AccelkitError(
            f"{publication.name} has no tuned weights for {', '.join(strange)}; it has "
            f"{', '.join(experiment.tuned) or 'none at all'}"
        )
    if given.tuned and experiment.variants:
        raise AccelkitError(
            f"{publication.name} compares trainings ({', '.join(experiment.variants)}), so it "
            "makes all weights itself; leave --tuned out"
        )
    untrained = set(experiment.tuned) - set(given.tuned)
    if source.model and experiment.from_scratch and untrained:
        raise AccelkitError(
            f"{publication.name} trains every network from scratch with the same settings; leave "
            f"--model out, or also give --tuned for {', '.join(sorted(untrained))}"
        )
    return source


@dataclass
class _Work:
    """The trainings of one reproduction; finished ones are not run again."""

    publication: Publication
    experiment: Experiment
    source: Source
    seed: int
    output: Path
    reporter: Reporter

    def base(self) -> Source:
        """Return the model that everything is compared on, trained if no model is named."""
        if self.source.model:
            return self.source
        change = {**self.experiment.base}
        if self.experiment.from_scratch:  # trained like the others, but at full depth
            change = {**self.experiment.training, "intermediate_weight": 0.0, **change}
        folder = self.output / BASE
        self._scratch("full", self._config(change), folder)
        place = folder / PIPELINE
        if self.experiment.process == "vp-sde":
            place = folder / CONTINUOUS
            if World.launched().main and not place.exists():
                _continuous(folder / PIPELINE, place)
            World.launched().wait()
        return replace(self.source, model=str(place), vae=None)

    def train(self, base: Source, schedule: str, change: Mapping[str, Any], folder: Path) -> None:
        """Train weights for ``schedule`` and save them as an artifact in ``folder``."""
        config = self._config({**self.experiment.training, **change})
        self.reporter.say(f"weights for {schedule}, in {folder}")
        if not self.experiment.from_scratch:
            if not _finished(folder, folder / artifact.CONFIG, config):
                finetune(base, schedule, config, None, _run(folder, config), self.reporter)
            return
        self._scratch(schedule, config, folder / TRAINING)
        if World.launched().main and not (folder / artifact.CONFIG).exists():
            pipe = open_pipeline(folder / TRAINING / PIPELINE)
            enable(pipe, schedule)
            training = {"data": base.data, "flip": base.flip, **config.to_dict()}
            artifact.save(pipe, folder, base_model=base.model, training=training)

    def _config(self, settings: Mapping[str, Any]) -> TrainConfig:
        return TrainConfig.from_dict({**settings, "seed": self.seed})

    def _scratch(self, schedule: str, config: TrainConfig, folder: Path) -> None:
        if _finished(folder, folder / PIPELINE, config):
            return
        vae = self.source.vae or self.experiment.vae
        place = str(builtin() / "vae") if vae == BUILTIN else vae
        sizes = ModelConfig(**(self.experiment.network or self.publication.network))
        where = _run(folder, config)
        source = replace(self.source, vae=place)
        scratch(source, schedule, sizes, AutoencoderConfig(), config, where, self.reporter)


def _finished(folder: Path, result: Path, config: TrainConfig) -> bool:
    """Whether a training with these settings has ended; with others, the training itself raises."""
    return result.exists() and RunDirectory(folder).stored().get("train") == config.to_dict()


def _run(folder: Path, config: TrainConfig) -> Run:
    every = max(100, config.steps // _CHECKPOINTS)
    return Run(folder, resume=bool(RunDirectory(folder).stored()), checkpoint_every=every)


def _continuous(trained: Path, target: Path) -> None:
    """Copy a pipeline of the linear-beta process with the VP SDE that it discretises."""
    from accelkit.noise.vp_sde import VPSDEEulerMaruyamaScheduler

    pipe = open_pipeline(trained)
    pipe.register_modules(scheduler=VPSDEEulerMaruyamaScheduler())
    save_pipeline(pipe, target, AGAIN)


def _plan(experiment: Experiment, given: Given) -> Protocol:
    first = given.seed * experiment.images
    for seed in (first, first + experiment.images - 1):
        check_seed(seed)
    return Protocol(
        methods=",".join(experiment.methods),
        samplers=experiment.samplers,
        images=experiment.images,
        batch_size=experiment.batch_size,
        seed=first,
        guidance=experiment.guidance,
        guidance_channels=experiment.guidance_channels or None,
        kernels=given.kernels,
        rounds=experiment.rounds,
        timing_batch_size=experiment.timing_batch_size,
        throughput=(),  # no published table has any
        features=given.features,
        features_sha256=given.features_sha256,
        reference=given.reference,
    )
