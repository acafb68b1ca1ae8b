"""What a retrofit leaves behind, and that it comes back bit for bit or not at all."""

import ast
import errno
import json
from functools import partial

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import accelkit
from accelkit.artifact import artifact
from accelkit.artifact.names import named
from accelkit.errors import AccelkitError
from accelkit.layouts.original import numerics
from accelkit.runtime.switch import enabled_on
from accelkit.schedule import Schedule

SCHEDULE = "6@0.3,4@0.6,2@1"


def inputs():
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(4, 4, 8, 8, generator=draw)
    return x, torch.tensor([900, 100, 500, 100]), torch.tensor([3, 1, 999, 1000])


@torch.no_grad()
def outputs(pipe):
    x, t, y = inputs()
    return pipe.transformer(x, timestep=t, class_labels=y).sample


def images(pipe):
    draw = torch.Generator().manual_seed(0)
    made = pipe(class_labels=[1, 2], generator=draw, num_inference_steps=4, output_type="np")
    return made.images


def weights(pipe):
    return {k: v.clone() for k, v in pipe.transformer.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def base(make_pipe, tmp_path):
    """A plain pipeline's directory."""
    make_pipe().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def tuned(make_pipe):
    """The same pipeline with other weights and a schedule in force, as fine-tuning leaves it."""
    pipe = make_pipe(seed=1)
    accelkit.enable(pipe, SCHEDULE)
    return pipe


@pytest.fixture
def saved(tuned, base, tmp_path):
    """The artifact of ``tuned``."""
    return accelkit.save(tuned, tmp_path / "tuned-6", base_model=str(base), training={"steps": 3})


def test_it_comes_back_bit_for_bit(saved, tuned, base):
    expected = outputs(tuned)
    assert not torch.equal(outputs(DiTPipeline.from_pretrained(base)), expected)
    pipe = accelkit.from_pretrained(saved)
    assert torch.equal(outputs(pipe), expected)
    assert enabled_on(pipe).schedule == Schedule.parse(SCHEDULE, 6)
    tuned.register_modules(vae=pipe.vae)
    np.testing.assert_array_equal(images(pipe), images(tuned))

    own = DiTPipeline.from_pretrained(base)
    handle = accelkit.load(own, saved)
    assert handle is enabled_on(own)
    assert torch.equal(outputs(own), expected)


def test_disabling_leaves_the_tuned_weights(saved, tuned):
    pipe = accelkit.from_pretrained(saved)
    accelkit.disable(pipe)
    accelkit.disable(tuned)
    assert torch.equal(outputs(pipe), outputs(tuned))
    accelkit.enable(pipe, "uniform:3")


def test_what_it_records(saved, base):
    config = json.loads((saved / "accelkit.json").read_text())
    assert len(config.pop("sha256")) == 64
    with safe_open(saved / "accelkit.safetensors", "pt") as file:
        recorded = file.metadata()["accelkit.sha256"]
    assert config == {
        "format": 1,
        "accelkit": accelkit.__version__,
        "family": "dit",
        "schedule": {
            "name": SCHEDULE,
            "layers": 6,
            "intervals": [
                {"until": 0.3, "depth": 6},
                {"until": 0.6, "depth": 4},
                {"until": 1.0, "depth": 2},
            ],
        },
        "base_model_name_or_path": str(base),
        "revision": None,
        "vae": None,
        "num_heads": None,
        "weights": recorded,
        "training": {"steps": 3},
        "metrics": {},
    }
    assert named(saved).config == config
    assert named(base).config is None
    assert sorted(p.name for p in saved.iterdir()) == [
        "README.md",
        "accelkit.json",
        "accelkit.safetensors",
    ]


def test_the_base_is_where_the_pipeline_came_from(base, tmp_path):
    pipe = DiTPipeline.from_pretrained(base)
    accelkit.enable(pipe, SCHEDULE)
    config = named(accelkit.save(pipe, tmp_path / "a")).config
    assert config["base_model_name_or_path"] == str(base)


def test_the_built_in_model_is_recorded_by_name(tmp_path):
    pipe = DiTPipeline.from_pretrained(accelkit.builtin())
    accelkit.enable(pipe, "D4")
    config = named(accelkit.save(pipe, tmp_path / "a")).config
    assert config["base_model_name_or_path"] == "builtin"
    assert torch.equal(outputs(accelkit.from_pretrained(tmp_path / "a")), outputs(pipe))


def test_the_cards_example_runs(saved, tuned, monkeypatch):
    card = (saved / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: accelkit\n")
    assert "| 0.3 – 0.6 | 4 of 6 |" in card
    assert "Mean depth 3.80, ideal saving 36.7%" in card  # 0.3 * 6 + 0.3 * 4 + 0.4 * 2 of 6
    code = card.split("```python\n")[1].split("```")[0]
    called = [n.attr for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Attribute)]
    assert set(called) & set(accelkit.__all__) == {"from_pretrained"}
    monkeypatch.chdir(saved.parent)
    names = {}
    exec(code, names)
    assert torch.equal(outputs(names["pipe"]), outputs(tuned))
    assert len(names["images"]) == 3


def test_the_card_of_the_current_directory_has_its_name(tuned, base, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    accelkit.save(tuned, ".", base_model=str(base))
    assert 'from_pretrained("here")' in (tmp_path / "here" / "README.md").read_text()


def test_a_loaded_artifact_saved_by_diffusers_is_a_plain_pipeline(saved, tuned, tmp_path):
    accelkit.from_pretrained(saved).save_pretrained(tmp_path / "plain")
    accelkit.disable(tuned)
    plain = DiTPipeline.from_pretrained(tmp_path / "plain")
    assert torch.equal(outputs(plain), outputs(tuned))


def test_saving_replaces_an_artifact(saved, tuned, base):
    accelkit.disable(tuned)
    accelkit.enable(tuned, "uniform:2")
    accelkit.save(tuned, saved, base_model=str(base))
    pipe = accelkit.from_pretrained(saved)
    assert enabled_on(pipe).schedule.depths == (2,)
    assert torch.equal(outputs(pipe), outputs(tuned))


def test_no_room_leaves_what_was_there(saved, make_pipe, base, monkeypatch):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}

    def full(tensors, path, metadata=None):
        path.write_bytes(b"the first bytes")
        raise OSError(errno.ENOSPC, "No space left on device")

    other = make_pipe(seed=2)
    accelkit.enable(other, "uniform:3")
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(AccelkitError, match="no room to write"):
        accelkit.save(other, saved, base_model=str(base))
    assert {n: (saved / n).read_bytes() for n in before} == before


def test_weights_and_settings_of_two_saves_are_refused(saved, make_pipe, base, monkeypatch):
    """Killed in between, the new weights would run on the old schedule."""
    other = make_pipe(seed=2)
    accelkit.enable(other, "uniform:3")
    expected = outputs(other)

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(artifact, "write_record", killed)
        with pytest.raises(KeyboardInterrupt):
            accelkit.save(other, saved, base_model=str(base))
    with pytest.raises(AccelkitError, match="were not saved together; save the artifact again"):
        accelkit.from_pretrained(saved)
    accelkit.save(other, saved, base_model=str(base))
    assert torch.equal(outputs(accelkit.from_pretrained(saved)), expected)


def test_weights_that_another_program_wrote_again_are_taken(saved, tuned):
    path = saved / "accelkit.safetensors"
    save_file({k: v.half() for k, v in load_file(path).items()}, path)
    found = weights(accelkit.from_pretrained(saved))
    assert all(torch.equal(found[k], v.half().float()) for k, v in weights(tuned).items())


def test_what_a_killed_save_left_is_removed(saved, tuned, base):
    (saved / "accelkit.safetensors.partial").mkdir()
    (saved / "accelkit.safetensors.partial" / ".tmpAbCdEf").write_bytes(b"of safetensors")
    accelkit.save(tuned, saved, base_model=str(base))
    assert len(list(saved.iterdir())) == 3


def test_saving_needs_a_schedule_and_a_base(pipe, tuned, tmp_path):
    with pytest.raises(AccelkitError, match="runs no schedule"):
        accelkit.save(pipe, tmp_path / "a", base_model="builtin")
    with pytest.raises(AccelkitError, match="base_model="):
        accelkit.save(tuned, tmp_path / "a")
    assert not (tmp_path / "a").exists()


# what is refused: name -> what is done to an artifact's folder and what the message says
def edit(folder, **changes):
    path = folder / "accelkit.json"
    config = {**json.loads(path.read_text()), **changes}
    del config["sha256"]
    path.write_text(json.dumps(config))


def cut(folder):
    path = folder / "accelkit.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def reshape(folder, change):
    path = folder / "accelkit.safetensors"
    tensors = load_file(path)
    tensors = {k: v.clone() for k, v in tensors.items()}
    change(tensors)
    save_file(tensors, path)


def shorten(tensors):
    tensors["proj_out_2.bias"] = tensors["proj_out_2.bias"][:-1].clone()


def flip(content, at):
    return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]


def zero(content, at):
    return content[:at] + bytes(len(content[at : at + 4096])) + content[at + 4096 :]


def spoil(name, how, at, folder):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(how(content, int(at * len(content))))


def poison(value, name="transformer_blocks.3.attn1.to_q.weight"):
    def change(tensors):
        tensors[name][1, 2] = value

    return lambda folder: reshape(folder, change)


def as_integers(tensors):
    tensors["proj_out_2.bias"] = tensors["proj_out_2.bias"].int()


REFUSED = {
    "NaN": (poison(torch.nan), r"blocks\.3\.attn1\.to_q\.weight in .* holds NaN or infinite"),
    "infinity": (poison(-torch.inf), r"blocks\.3\.attn1\.to_q\.weight in .* NaN or infinite"),
    "integers": (lambda f: reshape(f, as_integers), r"proj_out_2\.bias in .* stored as int32"),
    "another family": (lambda f: edit(f, family="uvit"), "made for a uvit of 6 blocks"),
    "another format": (lambda f: edit(f, format=2), "not of format 1"),
    "no format": (lambda f: (f / "accelkit.json").write_text("{}"), "not of format 1"),
    "a list": (lambda f: (f / "accelkit.json").write_text("[]"), "not of format 1"),
    "broken JSON": (lambda f: (f / "accelkit.json").write_text("{"), "cannot read"),
    "no UTF-8": (lambda f: (f / "accelkit.json").write_bytes(b"\xff\xfe"), "cannot read"),
    "a schedule of text": (lambda f: edit(f, schedule="D4"), "a schedule is a table"),
    "a schedule too deep": (
        lambda f: edit(
            f, schedule={"layers": 6, "name": "", "intervals": [{"until": 1, "depth": 7}]}
        ),
        "above the model's 6",
    ),
    "truncated weights": (cut, r"accelkit\.safetensors is damaged"),
    "no weights": (lambda f: (f / "accelkit.safetensors").unlink(), "cannot read the model"),
    "a missing weight": (
        lambda f: reshape(f, lambda t: t.pop("proj_out_2.bias")),
        "1 keys differ, e.g. proj_out_2.bias",
    ),
    "a strange weight": (
        lambda f: reshape(f, lambda t: t.update(x=torch.ones(1))),
        "1 keys differ, e.g. x",
    ),
    "another shape": (lambda f: reshape(f, shorten), "1 keys differ, e.g. proj_out_2.bias"),
    **{
        f"{file} with {what} {at}": (partial(spoil, file, how, at), message)
        for file, message in (
            ("accelkit.safetensors", r"accelkit\.safetensors is damaged|cannot read the model"),
            ("accelkit.json", r"accelkit\.json is damaged|cannot read .*accelkit\.json"),
        )
        for what, how in (("a flipped bit at", flip), ("zeros at", zero))
        for at in (0.1, 0.4, 0.7, 0.99)
    },
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_and_changes_nothing(case, saved, make_pipe):
    spoil, message = REFUSED[case]
    spoil(saved)
    pipe = make_pipe(seed=3)
    before, expected = weights(pipe), outputs(pipe)
    with pytest.raises(AccelkitError, match=message) as caught:
        accelkit.load(pipe, saved)
    assert "\n" not in str(caught.value)
    assert same(weights(pipe), before)
    assert torch.equal(outputs(pipe), expected)
    assert enabled_on(pipe) is None
    with pytest.raises(AccelkitError, match=message):
        accelkit.from_pretrained(saved)


def test_another_depth_is_refused(saved, make_pipe):
    pipe = make_pipe(layers=4)
    before = weights(pipe)
    with pytest.raises(AccelkitError, match="of 6 blocks, this is a dit of 4"):
        accelkit.load(pipe, saved)
    assert same(weights(pipe), before)
    assert enabled_on(pipe) is None


def test_a_pipeline_with_a_schedule_is_refused(saved, pipe):
    accelkit.enable(pipe, "uniform:5")
    before = weights(pipe)
    with pytest.raises(AccelkitError, match=r"accelkit\.disable first"):
        accelkit.load(pipe, saved)
    assert same(weights(pipe), before)
    assert enabled_on(pipe).schedule.depths == (5,)


def test_a_scheduler_without_a_noise_level_is_refused_and_changes_nothing(saved, pipe):
    class Unplaced(DDIMScheduler):
        pass

    pipe.scheduler = Unplaced()
    del pipe.scheduler.betas
    before = weights(pipe)
    with pytest.raises(AccelkitError, match="noise axis"):
        accelkit.load(pipe, saved)
    assert same(weights(pipe), before)
    assert enabled_on(pipe) is None


def test_no_artifact_is_no_artifact(base, pipe, tmp_path):
    (tmp_path / "empty").mkdir()
    for place in (base, tmp_path / "empty"):
        with pytest.raises(AccelkitError, match=r"no accelkit artifact: it has no accelkit\.json"):
            accelkit.load(pipe, place)


def test_a_base_that_is_gone_is_named(saved, base):
    base.rename(base.with_name("moved"))
    with pytest.raises(AccelkitError, match=f"no model at {base}"):
        accelkit.from_pretrained(saved)


def test_the_built_in_model_is_a_plain_pipeline():
    pipe = accelkit.from_pretrained("builtin")
    assert type(pipe) is DiTPipeline
    assert enabled_on(pipe) is None
    assert pipe.transformer.dtype == torch.float32
    plain = DiTPipeline.from_pretrained(accelkit.builtin())
    assert torch.equal(outputs(pipe), outputs(plain))


# --- the hub, without a network: its client's own cache, filled by hand


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Puts a folder into the hub client's cache as a repository's branch; the network is off."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def publish(folder, repo, branch="main"):
        where = cache / f"models--{repo.replace('/', '--')}"
        commit = f"{len(list(where.glob('snapshots/*'))):040x}"
        (where / "refs").mkdir(parents=True, exist_ok=True)
        (where / "refs" / branch).write_text(commit)
        (where / "snapshots").mkdir(exist_ok=True)
        folder.rename(where / "snapshots" / commit)

    return publish


def test_artifact_and_base_from_the_hub(hub, base, tuned, make_pipe, tmp_path):
    make_pipe(seed=5).save_pretrained(tmp_path / "other")
    hub(tmp_path / "other", "me/base")
    hub(base, "me/base", branch="v2")
    hub(accelkit.save(tuned, tmp_path / "a", base_model="me/base", revision="v2"), "me/tuned")
    pipe = accelkit.from_pretrained("me/tuned")
    assert torch.equal(outputs(pipe), outputs(tuned))
    own = accelkit.from_pretrained("me/base", revision="v2")
    assert enabled_on(own) is None
    assert own.name_or_path == "me/base"  # where an artifact made of it says it came from
    expected = outputs(make_pipe(seed=0))
    assert torch.equal(outputs(own), expected)
    assert not torch.equal(outputs(accelkit.from_pretrained("me/base")), expected)
    accelkit.load(own, "me/tuned")
    assert torch.equal(outputs(own), outputs(tuned))
    assert named("me/tuned").config["revision"] == "v2"


def test_a_revision_of_an_artifact(hub, base, tuned, tmp_path):
    expected = outputs(tuned)
    hub(accelkit.save(tuned, tmp_path / "a", base_model=str(base)), "me/tuned")
    accelkit.disable(tuned)
    accelkit.enable(tuned, "uniform:2")
    hub(accelkit.save(tuned, tmp_path / "b", base_model=str(base)), "me/tuned", branch="shallow")
    assert torch.equal(outputs(accelkit.from_pretrained("me/tuned")), expected)
    shallow = accelkit.from_pretrained("me/tuned", revision="shallow")
    assert torch.equal(outputs(shallow), outputs(tuned))


def test_what_is_not_on_the_hub_is_one_line(hub, pipe):
    for act in (accelkit.from_pretrained, lambda name: accelkit.load(pipe, name)):
        with pytest.raises(AccelkitError, match="me/nothing") as caught:
            act("me/nothing")
        assert "\n" not in str(caught.value)


# --- models from original checkpoints


def test_a_model_from_an_original_checkpoint_keeps_its_frequencies(original, make_pipe, tmp_path):
    pipe = make_pipe()
    pipe.register_modules(transformer=accelkit.load_original(original, num_heads=2))
    expected = outputs(pipe)
    pipe.save_pretrained(tmp_path / "pipeline")
    own = accelkit.from_pretrained(tmp_path / "pipeline")
    assert numerics(own.transformer) == {"timestep_frequencies": "original", "norm_eps": 1e-6}
    assert torch.equal(outputs(own), expected)
    plain = DiTPipeline.from_pretrained(tmp_path / "pipeline")
    assert not torch.equal(outputs(plain), expected)  # diffusers builds its own: why it matters

    accelkit.enable(own, SCHEDULE)
    accelkit.save(own, tmp_path / "artifact")
    again = accelkit.from_pretrained(tmp_path / "artifact")
    assert torch.equal(outputs(again), outputs(own))
    with pytest.warns(accelkit.AccelkitWarning, match="original checkpoint"):
        accelkit.load(plain, tmp_path / "artifact")


@pytest.fixture
def vae(pipe, tmp_path):
    """The directory of an autoencoder."""
    pipe.vae.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def test_an_artifact_of_an_original_checkpoint_is_opened_again(
    original, vae, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    pipe = accelkit.from_pretrained("dit.safetensors", vae="vae", num_heads=2)
    accelkit.enable(pipe, SCHEDULE)
    with torch.no_grad():
        pipe.transformer.proj_out_2.bias.add_(1)  # tuned
    accelkit.save(pipe, "tuned", base_model="dit.safetensors", vae="vae", num_heads=2)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = named(tmp_path / "tuned").config
    assert config["base_model_name_or_path"] == str(original)
    assert (config["vae"], config["num_heads"]) == (str(vae), 2)
    again = accelkit.from_pretrained(tmp_path / "tuned")
    assert torch.equal(outputs(again), outputs(pipe))
    assert same(again.vae.state_dict(), pipe.vae.state_dict())


def test_an_artifact_from_before_these_were_recorded(saved, tuned):
    config = json.loads((saved / "accelkit.json").read_text())
    assert config["format"] == 1
    newer = ("vae", "num_heads", "revision", "weights", "sha256")
    old = {k: v for k, v in config.items() if k not in newer}
    (saved / "accelkit.json").write_text(json.dumps(old))
    save_file(load_file(saved / "accelkit.safetensors"), saved / "accelkit.safetensors")
    assert torch.equal(outputs(accelkit.from_pretrained(saved)), outputs(tuned))


@pytest.mark.parametrize("given", [{"vae": "some/vae"}, {"num_heads": 2}])
def test_what_has_its_own_autoencoder_and_heads_is_given_none(saved, tuned, base, tmp_path, given):
    word = "an autoencoder" if "vae" in given else "a number of heads"
    for name in (saved, base, "builtin"):
        with pytest.raises(AccelkitError, match=f"{name} has its own settings; leave {word} out"):
            accelkit.from_pretrained(name, **given)
    with pytest.raises(AccelkitError, match=f"{base} has its own"):
        accelkit.save(tuned, tmp_path / "b", base_model=str(base), **given)
    assert not (tmp_path / "b").exists()
