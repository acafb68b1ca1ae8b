"""Fine-tuning a model that is prompted by text, and one of pixels, from data to artifact."""

import json

import numpy as np
import pytest
import text_pipes
import torch
from diffusers import AuraFlowPipeline, DDIMPipeline, DDIMScheduler, UNet2DModel
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import accelkit
from accelkit.artifact.names import named
from accelkit.backbones import denoiser_of, flux, wan
from accelkit.bench import comparison
from accelkit.cli import app
from accelkit.errors import AccelkitError
from accelkit.jobs.finetune import finetune
from accelkit.jobs.reporter import Silent
from accelkit.jobs.settings import Run, Source
from accelkit.runtime.switch import enabled_on
from accelkit.train.config import TrainConfig

SMALL = ["--eval-images", "2", "--eval-batch-size", "2", "--sampling-steps", "2"]
TRAINING = {"steps": 2, "batch_size": 4, "learning_rate": 1e-2, "ema_decay": 0.0}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of pipelines, by family."""
    made = {}

    def directory(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family) / "model"
            text_pipes.make(family).save_pretrained(made[family])
        return made[family]

    return directory


@pytest.fixture
def data(tmp_path):
    """Six captioned images."""
    draw = np.random.default_rng(0)
    folder = tmp_path / "data"
    folder.mkdir()
    rows = []
    for i in range(6):
        pixels = draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": f"picture {'abc'[i % 3]}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def cli(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def command(model, data, run, *more):
    return [
        *("finetune", "--model", model, "--data", data, "--schedule", "4@0.5,2@1", "-o", run),
        *("--steps", "2", "--batch-size", "4", "--learning-rate", "1e-2", "--ema-decay", "0"),
        *(*SMALL, *more),
    ]


def schedule_of(family):
    return "3@0.5,1@1" if family == "hunyuan" else "4@0.5,2@1"  # blocks of HunyuanDiT's decoder


@pytest.fixture(autouse=True)
def sizes(monkeypatch):
    """Small pictures of networks that do not record a size, and few of them in a comparison."""
    monkeypatch.setattr(comparison, "_IN_A_PICTURE", 2)
    monkeypatch.setattr(flux._FluxCaptions, "shape", (4, 8, 8))
    monkeypatch.setattr(wan._WanCaptions, "shape", (4, 4, 4))


def changed(run, model):
    """Names of the weights that a run changed, and of all."""
    own, other = (denoiser_of(accelkit.from_pretrained(p)).state_dict() for p in (run, model))
    return {name for name in own if not torch.equal(own[name], other[name])}, own.keys()


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("pixart", ["--preview-every", "2"]),
        ("sd3", ["--sampler", "flow", "--timestep-density", "logit-normal"]),
        ("flux", ["--sampler", "flow"]),
        ("sana", []),  # sampled by the sampler of its own process
        ("hunyuan", []),
        ("sd", []),
        ("sdxl", []),
        ("wan", []),
        ("auraflow", []),  # accelkit has no file for this family and the next
        ("lumina2", []),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_from_captions_to_an_artifact(models, data, tmp_path, family, options):
    model, run, schedule = models(family), tmp_path / "run", schedule_of(family)
    done = cli(*command(model, data, run, "--schedule", schedule, *options, "--json"))
    rows = json.loads(done.stdout)["rows"]
    assert [row["weights"] for row in rows] == ["original", "original", "tuned"]
    assert (run / "previews" / "step-00000002.png").is_file() == (family == "pixart")

    names, weights = changed(run, model)
    config = named(run).config
    assert accelkit.Schedule.from_dict(config["schedule"]).name == schedule
    assert "lora" not in config
    assert load_file(run / "accelkit.safetensors").keys() == weights
    assert any("attn" in name for name in names)
    time = ("timestep_embedder", "time_embedder", "time_embedding")
    assert not any(part in name for name in names for part in time)
    call = 'pipe("a red bird", num_frames=1).frames' if family == "wan" else 'pipe("a red bird").im'
    assert call in (run / "README.md").read_text()
    assert "text-to-image" in (run / "README.md").read_text()


@pytest.mark.parametrize(
    "family", ["pixart", "sd3", "flux", "sana", "hunyuan", "sd", "wan", "auraflow"]
)
def test_adapters_from_captions_to_an_artifact(models, data, tmp_path, family):
    model, run = models(family), tmp_path / "run"
    config = TrainConfig(**TRAINING, lora_rank=2)
    source = Source(str(model), str(data))
    finetune(source, schedule_of(family), config, None, Run(run), Silent())
    names, _ = changed(run, model)
    lora = named(run).config["lora"]
    assert lora["rank"] == 2
    targets = {f"{name}.weight" for name in lora["targets"]}
    # SD3's last block has no queries for the text
    assert targets - names <= {"transformer_blocks.3.attn.add_q_proj.weight"}
    assert names <= targets
    assert all(".lora_" in name for name in load_file(run / "accelkit.safetensors"))


def test_a_finished_run_is_measured_again_without_encoding(models, data, tmp_path):
    run = tmp_path / "run"
    cli(*command(models("pixart"), data, run, "--lora-rank", "2"))
    first = load_file(run / "accelkit.safetensors")
    cli("finetune", "-o", run, "--resume", "latest", "--eval-images", "1")
    again = load_file(run / "accelkit.safetensors")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[k], again[k]) for k in first)


def test_captions_are_missing(models, data, tmp_path, monkeypatch):
    monkeypatch.setattr("accelkit.jobs.inputs.encode_latents", None)
    (data / "metadata.jsonl").unlink()
    with pytest.raises(AccelkitError, match=r"prompted by text and .* has no captions") as caught:
        cli(*command(models("pixart"), data, tmp_path / "run"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_schedule_that_drops_every_adapter_is_refused(data, tmp_path):
    model = pixel_unet(tmp_path / "model")
    options = ("--schedule", "4@0.5,0@1", "--lora-rank", "2")
    with pytest.raises(AccelkitError, match="at depth 0 this UNet2DModel runs no linear layer"):
        cli(*command(model, data, tmp_path / "run", *options))
    assert not (tmp_path / "run").exists()


def test_a_transformer_whose_call_is_not_known_is_refused(data, tmp_path, monkeypatch):
    """What a caption is to become its pipeline has to show."""

    def encode_prompt(*args, **kwargs):
        raise ValueError("no prompt without an image")

    monkeypatch.setattr(AuraFlowPipeline, "encode_prompt", encode_prompt)
    text_pipes.make("auraflow").save_pretrained(tmp_path / "model")
    for options in ([], ["--lora-rank", "2"]):
        words = "cannot call a AuraFlow.*but it does not run on prompts alone: no prompt without"
        with pytest.raises(AccelkitError, match=words) as caught:
            cli(*command(tmp_path / "model", data, tmp_path / "run", *options))
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "run").exists()


def test_merging_that_a_family_cannot_do_is_refused_before_anything_is_encoded(
    models, data, tmp_path, monkeypatch
):
    for encode in ("encode_latents", "encode_captions"):
        monkeypatch.setattr(f"accelkit.jobs.inputs.{encode}", None)
    given = command(models("sd3"), data, tmp_path / "run", "--schedule", "tome:0.3")
    for arguments in (given, ["inspect", "--model", models("sd3"), "--schedule", "tome:0.3"]):
        with pytest.raises(AccelkitError, match="tokens cannot be merged in a sd3"):
            cli(*arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("family", "options", "match"),
    [
        ("sd3", ["--sampler", "ddim"], "sampler ddim does not follow"),
        ("pixart", ["--timestep-density", "logit-normal"], "needs flow matching"),
    ],
)
def test_what_does_not_suit_the_process_is_refused_at_once(
    models, data, tmp_path, family, options, match
):
    with pytest.raises(AccelkitError, match=match):
        cli(*command(models(family), data, tmp_path / "run", *options))
    assert not (tmp_path / "run").exists()


def test_adapters_of_an_artifact_are_refused(models, data, tmp_path):
    run = tmp_path / "run"
    cli(*command(models("pixart"), data, run))
    with pytest.raises(AccelkitError, match="tuned already, to which no adapter"):
        cli(*command(run, data, tmp_path / "other", "--lora-rank", "2"))


def test_sampling_by_class_is_refused(models, tmp_path):
    with pytest.raises(AccelkitError, match="prompted by text; open it with"):
        cli("sample", "--model", models("pixart"), "-o", tmp_path / "samples")


def pixel_unet(path):
    """A UNet of pixels: attention on either side of the middle block, four counted blocks."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
    DDIMPipeline(network, DDIMScheduler()).save_pretrained(path)
    return path


@pytest.mark.parametrize("options", [[], ["--lora-rank", "2"]], ids=["whole", "lora"])
def test_a_model_without_classes_or_autoencoder(data, tmp_path, options):
    """Pixels in, pixels out."""
    model, run = pixel_unet(tmp_path / "model"), tmp_path / "run"
    cli(*command(model, data, run, *options))
    assert str(enabled_on(accelkit.from_pretrained(run)).schedule) == "4@0.5,2@1"
    names, _ = changed(run, model)
    if options:
        attentions = ("down_blocks.1.attentions", "mid_block.attentions", "up_blocks.0.attentions")
        assert names
        assert all(n.startswith(attentions) and ".to_" in n for n in names)
        return
    assert "conv_in.weight" in names
    assert not any("time_embedding" in name for name in names)
    out = tmp_path / "samples"
    cli("sample", "--model", run, "-o", out, "-n", "2", "--steps", "2")
    assert {p.name for p in out.glob("0*")} == {"000000.png", "000001.png"}
    with pytest.raises(AccelkitError, match="has no classes; leave --labels out"):
        cli("sample", "--model", run, "-o", tmp_path / "x", "--labels", "3")
    with pytest.raises(AccelkitError, match="nothing to guide by"):
        cli("sample", "--model", run, "-o", tmp_path / "y", "-n", "1", "--guidance", "2")
