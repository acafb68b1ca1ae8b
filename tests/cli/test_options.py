"""Options from settings classes: a field is an option with its help, its check and its default."""

import json
from dataclasses import dataclass, fields
from typing import Annotated

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from accelkit.bench.protocol import Protocol
from accelkit.cli import app
from accelkit.cli.command import Call, command
from accelkit.cli.help import Command
from accelkit.cli.options import Options
from accelkit.errors import AccelkitError
from accelkit.fields import COUNT, PANELS, TRAINING, setting
from accelkit.jobs.defaults import with_data
from accelkit.jobs.settings import ModelConfig, Run, Source
from accelkit.sample.sampling import Sampling
from accelkit.train.config import AutoencoderConfig, TrainConfig

SETTINGS = (Source, TrainConfig, Run, Sampling, Protocol, ModelConfig, AutoencoderConfig, Call)


@dataclass(frozen=True)
class Extended(TrainConfig):
    """A training configuration with one more field, which is all that an option takes."""

    warm_restarts: int = setting(3, "Number of warm restarts", TRAINING, rule=COUNT)


def run(function, *arguments, layers=()):
    """Run a function as a command; return what its function received, and the outcome."""
    received = []
    own = typer.Typer(pretty_exceptions_enable=False)
    own.command(cls=Command)(command(*layers)(function(received)))
    return received, CliRunner().invoke(own, [str(a) for a in arguments])


def trains(received):
    def job(call: Call, training: Extended = Extended(steps=7)) -> None:
        received.append((call, training))

    return job


def test_a_new_training_option_is_one_field():
    ((_, training),), _ = run(trains)
    assert training == Extended(steps=7)
    ((_, training),), _ = run(trains, "--warm-restarts", "5", "--steps", "9")
    assert training == Extended(steps=9, warm_restarts=5)
    _, done = run(trains, "--help")
    assert "--warm-restarts INT" in done.stdout
    assert "Number of warm restarts [default: 3]" in done.stdout
    received, done = run(trains, "--warm-restarts", "0")
    assert received == []
    assert isinstance(done.exception, AccelkitError)
    assert str(done.exception) == "warm_restarts must be at least 1, got 0"
    assert Extended().to_dict() == TrainConfig().to_dict() | {"warm_restarts": 3}


def test_command_line_over_recipe_over_layers_over_defaults(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text("steps = 2\nbatch-size = 2\nwarm_restarts = 2\n")

    def above(training, **_):
        assert training.steps == 1
        return {"training": {"seed": 3, "batch_size": 3}}

    def below(training, **_):
        assert training.seed == 3
        return {"training": {"seed": 4}, "lora_rank": 4}

    ((call, training),), _ = run(trains, "--recipe", recipe, "--steps", "1", layers=(above, below))
    wanted = {"steps": 1, "batch_size": 2, "warm_restarts": 2, "seed": 3, "lora_rank": 4}
    assert training == Extended(**wanted)
    assert call.settings == TrainConfig().to_dict() | wanted | {
        "recipe": recipe,
        "dry_run": False,
        "json": False,
    }


def samples(received):
    def job(
        sampling: Annotated[Sampling, Options(named={"steps": "-k --calls"})] = Sampling(),
        protocol: Annotated[Protocol, Options(only=("throughput", "labels"))] = Protocol("full"),
    ) -> None:
        received.append((sampling, protocol))

    return job


def test_names_and_fields_of_a_command():
    ((sampling, protocol),), _ = run(samples)
    assert (sampling, protocol) == (Sampling(), Protocol("full"))
    given = ("-k", "3", "--guidance-channels", "2", "--throughput", "1, 64", "--labels", "")
    ((sampling, protocol),), _ = run(samples, *given)
    assert sampling == Sampling(steps=3, guidance_channels=2)
    assert protocol == Protocol("full", throughput=(1, 64), labels=None)
    for wrong in ("--steps", "--samplers"):
        assert run(samples, wrong, "3")[1].exit_code == 2


@pytest.mark.parametrize("kind", SETTINGS, ids=lambda kind: kind.__name__)
def test_helps_are_phrases_in_a_panel(kind):
    for about in fields(kind):
        if about.metadata:
            assert about.metadata["panel"] in PANELS
            assert len(about.metadata["help"]) > 8
            assert not about.metadata["help"].endswith(".")
            assert not about.metadata["help"].startswith("Of ")


@pytest.mark.parametrize("name", get_command(app).commands)
def test_the_help_shows_every_name_in_full(name):
    shown = CliRunner().invoke(app, [name, "--help"]).stdout
    assert max(map(len, shown.splitlines())) <= 80
    for parameter in get_command(app).commands[name].params:
        assert parameter.help
        if parameter.secondary_opts:
            assert f"--[no-]{parameter.opts[0][2:]} " in shown
        else:
            assert all(flag in shown for flag in parameter.opts)


def test_defaults_are_those_of_the_classes():
    settings = json.loads(CliRunner().invoke(app, ["bench", "--dry-run", "--json"]).stdout)
    wanted = {"seed": 0, "rounds": 7, "samplers": "auto:50,auto:10", "throughput": "1,8"}
    wanted |= {"num_images": 500, "batch_size": 250, "data": "digits"}  # the built-in model's
    assert {name: settings[name] for name in wanted} == wanted


@pytest.mark.parametrize("name", ["finetune", "bench"])
def test_empty_data_is_the_built_in_models(name):
    assert CliRunner().invoke(app, [name, "--data", "", "--dry-run"]).exit_code == 0
    assert with_data(Source(data="")) == Source(data="digits")
