"""Reproductions of published tables on tiny networks, with a stand-in for the comparison."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import accelkit
from accelkit.assets import builtin
from accelkit.backbones import denoiser_of
from accelkit.errors import AccelkitError, Stopped
from accelkit.jobs import reproduce as job
from accelkit.jobs.published import Publication, publication
from accelkit.jobs.reproduce import Given, reproduce
from accelkit.jobs.settings import Source
from accelkit.noise.axis import NoiseAxis
from accelkit.runtime.switch import enabled_on

SHORT = {"steps": 2, "batch_size": 4, "learning_rate": 1e-2, "ema_decay": 0.0}
NETWORK = {"layers": 4, "heads": 2, "head_dim": 8, "num_classes": 2}


class Said:
    """A reporter that keeps its messages."""

    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)

    def advance(self, task, done, total, note=""):
        pass


@pytest.fixture
def benched(monkeypatch):
    """A stand-in for the comparison, which keeps its arguments."""
    calls = []

    def bench(source, plan, output, reporter, *, tuned, published):
        calls.append((source, plan, output, tuned, published))
        return {"rows": [], "output": str(output)}

    monkeypatch.setattr(job, "bench", bench)
    return calls


@pytest.fixture
def data(tmp_path):
    """Images of two classes."""
    draw = np.random.default_rng(0)
    for place in range(6):
        folder = tmp_path / "data" / str(place % 2)
        folder.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{place}.png")
    return str(tmp_path / "data")


def small(name: str, **changes) -> Publication:
    """A publication with an even smaller miniature."""
    read = publication(name)
    return replace(read, digits=replace(read.digits, **changes))


@pytest.fixture
def table3():
    return small("ase-table3", methods=("full", "D1", "D4"), tuned=("D1", "D4"), training=SHORT)


def run(read, source, output, given=None, said=None):
    return reproduce(read, "digits", source, given or Given(), output, said or Said())


def test_it_fine_tunes_each_schedule_and_compares_all(table3, model, data, benched, tmp_path):
    out, source = tmp_path / "out", Source(str(model), data)
    given = Given({}, "off", "digits", "abc", "statistics.npz")
    assert run(table3, source, out, given) == {"": {"rows": [], "output": str(out)}}
    ((compared, plan, place, tuned, published),) = benched
    assert (compared, place) == (source, out)
    assert tuned == {"D1": str(out / "D1"), "D4": str(out / "D4")}
    assert published == publication("ase-table3").published()
    assert plan.methods == "full,D1,D4"
    assert plan.samplers == ("ddpm:50", "ddim:50", "ddim:25")
    assert (plan.images, plan.batch_size, plan.timing_batch_size, plan.rounds) == (500, 250, 32, 7)
    assert (plan.guidance, plan.guidance_channels, plan.kernels) == (1.0, None, "off")
    assert (plan.features, plan.features_sha256) == ("digits", "abc")
    assert plan.reference == "statistics.npz"
    before = denoiser_of(accelkit.from_pretrained(model)).state_dict()
    for name, folder in tuned.items():
        pipe = accelkit.from_pretrained(folder)
        assert enabled_on(pipe).schedule.name == name
        after = denoiser_of(pipe).state_dict()
        assert any(not torch.equal(before[key], after[key]) for key in before)
        assert not (Path(folder) / "results.json").exists()


def test_the_same_again_trains_nothing(table3, model, data, benched, tmp_path, monkeypatch):
    source, out = Source(str(model), data), tmp_path / "out"
    run(table3, source, out)
    with monkeypatch.context() as patch:
        patch.setattr(job, "finetune", None)
        run(table3, source, out)
    assert len(benched) == 2
    assert benched[0] == benched[1]
    longer = small("ase-table3", tuned=("D1",), training={**SHORT, "steps": 3})
    with pytest.raises(AccelkitError, match=r"has other settings .*steps"):
        run(longer, source, out)


def test_an_interrupted_training_goes_on(table3, model, data, benched, tmp_path, monkeypatch):
    resumed, said = [], Said()
    real = job.finetune

    def stops(source, schedule, config, plan, where, reporter):
        resumed.append((schedule, where.resume))
        if len(resumed) == 2:
            raise Stopped(15, 1)
        return real(source, schedule, config, plan, where, reporter)

    monkeypatch.setattr(job, "finetune", stops)
    with pytest.raises(Stopped):
        run(table3, Source(str(model), data), tmp_path / "out", said=said)
    assert said.lines[-1] == "give the same accelkit reproduce again to go on"
    assert benched == []
    (tmp_path / "out" / "D4").mkdir()
    (tmp_path / "out" / "D1" / "accelkit.json").unlink()  # killed before it was written
    run(table3, Source(str(model), data), tmp_path / "out")
    assert resumed == [("D1", False), ("D4", False), ("D1", True), ("D4", False)]
    assert len(benched) == 1


def test_weights_that_there_are_are_taken(table3, model, data, benched, tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(job, "finetune", lambda *given: trained.append(given[1]))
    run(table3, Source(str(model), data), tmp_path / "out", Given({"D4": "elsewhere/d4"}))
    assert trained == ["D1"]
    assert benched[0][3] == {"D4": "elsewhere/d4", "D1": str(tmp_path / "out" / "D1")}


def test_another_seed_is_another_repetition(table3, model, data, benched, tmp_path):
    seeds = {}
    for seed in (0, 3):
        out = tmp_path / str(seed)
        run(table3, Source(str(model), data), out, Given(seed=seed))
        seeds[seed] = json.loads((out / "D1" / "run.json").read_text())["train"]["seed"]
    assert seeds == {0: 0, 3: 3}
    (_, first, *_), (_, other, *_) = benched
    assert (first.seed, other.seed) == (0, 3 * first.images)  # no image in both
    assert replace(first, seed=other.seed) == other


@pytest.mark.parametrize("seed", [-1, 2**32, 2**31])
def test_a_seed_without_numbers_for_all_images_is_refused(seed, benched, tmp_path):
    with pytest.raises(AccelkitError, match="a seed is in"):
        reproduce(
            publication("ase-table3"),
            "digits",
            Source("", ""),
            Given(seed=seed),
            tmp_path / "out",
            Said(),
        )
    assert benched == []
    assert not (tmp_path / "out").exists()


def test_trainings_from_scratch_with_and_without_supervision(data, benched, tmp_path):
    six = small(
        "dvd-table6",
        methods=("full", "dvd-2p"),
        tuned=("dvd-2p",),
        network=NETWORK,
        training={**SHORT, "freeze_time_embedder": False},
    )
    out = tmp_path / "out"
    results = run(six, Source("", data), out)
    assert list(results) == ["supervised", "unsupervised"]
    base = str(out / "base" / "pipeline")
    weights = {}
    for (source, _, place, tuned, published), variant in zip(benched, results, strict=True):
        assert (source.model, source.vae, source.data) == (base, None, data)
        assert place == out / variant
        assert tuned == {"dvd-2p": str(place / "dvd-2p")}
        assert published == six.published(variant)
        pipe = accelkit.from_pretrained(tuned["dvd-2p"])
        assert [c.depth for c in enabled_on(pipe).schedule.computes] == [4, 2]
        weights[variant] = denoiser_of(pipe).state_dict()
        stored = json.loads((place / "dvd-2p" / "training" / "run.json").read_text())
        assert stored["train"]["intermediate_weight"] == float(variant == "supervised")
        assert stored["model"]["layers"] == 4
        assert not (place / "dvd-2p" / "training" / "autoencoder").exists()
    one, other = weights.values()
    assert one.keys() == denoiser_of(accelkit.from_pretrained(base)).state_dict().keys()
    assert any(not torch.equal(one[key], other[key]) for key in one)
    stored = json.loads((out / "base" / "run.json").read_text())
    assert stored["schedule"]["name"] == "full"
    assert stored["train"]["intermediate_weight"] == 0
    own = load_file(builtin() / "vae" / "diffusion_pytorch_model.safetensors")
    theirs = load_file(Path(base).parent / "pipeline/vae/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(own[key].half(), theirs[key]) for key in own)


def test_a_uvit_is_trained_first_and_sampled_by_the_continuous_process(data, benched, tmp_path):
    four = small(
        "ase-table4",
        methods=("full", "D1"),
        tuned=("D1",),
        training=SHORT,
        network={**NETWORK, "family": "uvit"},
        base=SHORT,
    )
    out = tmp_path / "out"
    run(four, Source("", data), out)
    ((source, _, _, tuned, _),) = benched
    assert source.model == str(out / "base" / "continuous")
    for place in (source.model, tuned["D1"]):
        pipe = accelkit.from_pretrained(place)
        assert type(pipe.scheduler).__name__ == "VPSDEEulerMaruyamaScheduler"
    assert [c.depth for c in enabled_on(pipe).schedule.computes] == [2, 1]
    # of which the process it was trained on is a discretisation
    trained = accelkit.from_pretrained(out / "base" / "pipeline").scheduler
    levels = [NoiseAxis.of(s).levels([0, 250, 999]) for s in (trained, pipe.scheduler)]
    np.testing.assert_allclose(*levels, atol=5e-3)


@pytest.mark.parametrize(
    ("name", "scale", "source", "given", "words"),
    [
        ("ase-table3", "full", ("", "d"), {}, "needs --model .*DiT-XL/2.*--scale digits"),
        ("ase-table3", "full", ("m", ""), {}, "needs --data .*ImageNet.*--scale digits"),
        ("dvd-table4", "full", ("", ""), {}, r"needs --data \(it takes ImageNet\)$"),
        ("ase-table3", "full", ("m", "d"), {"D2": "x"}, "no tuned weights for D2; it has D1, D3"),
        ("ase-table5", "digits", ("", ""), {"D4": "x"}, "for D4; it has none at all"),
        (
            "dvd-table6",
            "digits",
            ("", ""),
            {"dvd-2p": "x"},
            "supervised, unsupervised.*--tuned out",
        ),
        ("dvd-table1", "digits", ("m", ""), {"dvd-2p": "x"}, "leave --model out, or.* dvd-3p, dvd"),
        ("dvd-table4", "digits", ("", ""), {}, "no miniature; run it with --scale full"),
        ("dvd-table-a2", "full", ("", ""), {}, "counted costs; nothing is run"),
        ("ase-table3", "tiny", ("", ""), {}, "a scale is full or digits, got 'tiny'"),
    ],
)
def test_what_is_missing_is_said_before_anything_begins(
    name, scale, source, given, words, benched, tmp_path
):
    with pytest.raises(AccelkitError, match=words):
        reproduce(publication(name), scale, Source(*source), Given(given), tmp_path / "out", Said())
    assert benched == []
    assert not (tmp_path / "out").exists()


def test_the_published_scale_asks_for_what_was_published(benched, tmp_path, monkeypatch):
    tunings = []
    monkeypatch.setattr(job, "finetune", lambda *given: tunings.append(given))
    read = publication("ase-table3")
    source = Source("DiT-XL-2-256x256.pt", "imagenet", vae="some/vae")
    reproduce(read, "full", source, Given(), tmp_path, Said())
    ((compared, plan, *_),) = benched
    assert compared == replace(source, flip=True)
    assert (plan.images, plan.batch_size) == (5000, 32)
    assert (plan.guidance, plan.guidance_channels) == (1.5, 3)
    assert plan.samplers == ("ddpm:250", "ddim:200", "ddim:100", "ddim:50")
    assert [given[1] for given in tunings] == ["D1", "D3", "D4", "D6"]
    config = tunings[0][2]
    assert (config.batch_size, config.learning_rate, config.ema_decay) == (64, 2e-5, 0.9999)
    assert tunings[0][3] is None  # compared once, at the end
    assert tunings[0][4].checkpoint_every == 800
