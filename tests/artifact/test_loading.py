"""Which pipeline a name means, and one line when there is none."""

import json
import logging
import os

import huggingface_hub.constants
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    UNet2DModel,
)
from typer.testing import CliRunner

import accelkit
from accelkit.artifact.loading import open_pipeline
from accelkit.artifact.names import named_base, reading
from accelkit.cli import app
from accelkit.errors import AccelkitError, AccelkitWarning
from accelkit.layouts.original import numerics, save_original


@torch.no_grad()
def outputs(model):
    draw = torch.Generator().manual_seed(1)
    size, channels = model.config.sample_size, model.config.in_channels
    x = torch.randn(2, channels, size, size, generator=draw)
    return model(x, timestep=torch.tensor([900, 3]), class_labels=torch.tensor([0, 1])).sample


@pytest.fixture
def saved(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refused(name, *words, **options):
    with pytest.raises(AccelkitError) as caught:
        open_pipeline(name, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


def test_a_directory(saved, pipe):
    opened = open_pipeline(saved)
    assert type(opened) is DiTPipeline
    assert torch.equal(outputs(opened.transformer), outputs(pipe.transformer))
    assert not opened.transformer.training
    assert opened._progress_bar_config == {"disable": True}
    assert dict(opened.scheduler.config) == dict(
        DiTPipeline.from_pretrained(saved).scheduler.config
    )


def test_built_in():
    opened = open_pipeline("builtin")
    assert opened.name_or_path == str(accelkit.builtin())


def test_half_precision_files_are_opened_in_float32(pipe, tmp_path):
    pipe.to(torch.float16).save_pretrained(tmp_path / "half")
    opened = open_pipeline(tmp_path / "half")
    for name in ("transformer", "vae"):
        stored = dict(getattr(pipe, name).named_parameters())
        for key, parameter in getattr(opened, name).named_parameters():
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, stored[key].float())


@pytest.mark.parametrize("names", [None, {"0": "cat", "1": "dog, hound"}])
def test_nothing_is_written_to_the_terminal(saved, names, capfd, monkeypatch):
    warned = []
    logger = logging.getLogger("diffusers.pipelines.pipeline_utils")
    monkeypatch.setattr(logger, "warning", warned.append)  # its stream is not always captured
    index = json.loads((saved / "model_index.json").read_text())
    (saved / "model_index.json").write_text(json.dumps({**index, "id2label": names}))
    labels = open_pipeline(saved).labels
    assert labels == ({"cat": 0, "dog": 1, "hound": 1} if names else {})
    assert warned == []
    assert capfd.readouterr() == ("", "")


def test_names(saved, tmp_path, monkeypatch):
    assert named_base(saved).place == str(saved)
    assert named_base("builtin").place == str(accelkit.builtin())
    assert named_base("facebook/DiT-XL-2-256").place == "facebook/DiT-XL-2-256"
    monkeypatch.chdir(tmp_path)
    assert named_base("model").place == "model"
    for name in ("nothing", "./model/else", "../x", "~/x", "a/b/c", str(tmp_path / "gone")):
        with pytest.raises(AccelkitError, match="no model at"):
            _ = named_base(name).place


def test_a_directory_of_something_else(tmp_path, saved):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no model_index.json")
    refused(saved / "vae", "no model_index.json")
    refused(saved / "vae", "a network alone: put it into a pipeline")


def test_a_network_alone_goes_into_a_pipeline(saved, pipe):
    opened = open_pipeline(saved / "transformer", vae=str(saved / "vae"))
    assert type(opened) is DiTPipeline
    assert torch.equal(outputs(opened.transformer), outputs(pipe.transformer))
    assert opened.vae.config.latent_channels == pipe.vae.config.latent_channels
    with pytest.raises(AccelkitError, match="has its own settings; leave a number of heads out"):
        open_pipeline(saved / "transformer", vae=str(saved / "vae"), num_heads=2)


def test_a_pipeline_around_another_network(tmp_path):
    net = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
    )
    DDPMPipeline(net, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    refused(tmp_path / "ddpm", "no attention and no middle block")


class Evil:
    """Pickled, it makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("part", ["model_index.json", "transformer/config.json", "vae/config.json",
                                  "scheduler/scheduler_config.json"])  # fmt: skip
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[]"])
def test_broken_json_is_one_line(saved, part, content):
    (saved / part).write_bytes(content)
    refused(saved, str(saved))


@pytest.mark.parametrize("name", ["transformer", "vae"])
@pytest.mark.parametrize("keep", [0, 5, 2000, -100])
def test_truncated_weights_are_one_line(saved, name, keep):
    path = saved / name / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    refused(saved, str(saved))


def test_missing_weights_are_one_line(saved):
    (saved / "transformer" / WEIGHTS).unlink()
    refused(saved, str(saved))


def test_weights_of_another_shape_are_one_line(saved):
    path = saved / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attention_head_dim": 8}))
    refused(saved, str(saved))


def test_weights_that_lack_some_are_refused(saved):
    # else the model would be part random, and nobody would know
    path = saved / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_layers": 7}))
    refused(saved, str(saved), "19 are missing, e.g. transformer_blocks.6.")


def test_pickled_code_in_a_pipeline_does_not_run(saved, tmp_path):
    (saved / "transformer" / WEIGHTS).unlink()
    torch.save(Evil(tmp_path / "ran"), saved / "transformer" / "diffusion_pytorch_model.bin")
    refused(saved, str(saved))
    assert not (tmp_path / "ran").exists()


# --- variants


def save_variants(pipe, place, *names, **options):
    for name in names:
        pipe.save_pretrained(place, variant=name, **options)
    return place


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "100KB"}], ids=["whole", "sharded"])
def test_a_variant_is_named_and_opened(pipe, tmp_path, options):
    place = save_variants(pipe, tmp_path / "model", "fp16", **options)
    refused(place, f"the weights in {place}/", "of the variant fp16 only", "give variant='fp16'")
    opened = open_pipeline(place, variant="fp16")
    assert torch.equal(outputs(opened.transformer), outputs(pipe.transformer))
    vae = pipe.vae.state_dict()
    assert all(torch.equal(value, vae[key]) for key, value in opened.vae.state_dict().items())
    assert torch.equal(
        outputs(accelkit.from_pretrained(place, variant="fp16").transformer),
        outputs(pipe.transformer),
    )


def test_one_of_several_variants(make_pipe, tmp_path):
    pipes = {name: make_pipe(seed=seed) for seed, name in enumerate(("fp16", "non_ema"))}
    for name, pipe in pipes.items():
        save_variants(pipe, tmp_path / "model", name)
    refused(tmp_path / "model", "of the variant fp16 and non_ema only", "give variant=")
    for name, pipe in pipes.items():
        opened = open_pipeline(tmp_path / "model", variant=name)
        assert torch.equal(outputs(opened.transformer), outputs(pipe.transformer))
    refused(tmp_path / "model", "fp16 and non_ema only", variant="bf16")


def test_plain_weights_beside_a_variant(make_pipe, tmp_path):
    """They are opened unless the variant is asked for, and where a component lacks it."""
    plain, other = make_pipe(seed=0), make_pipe(seed=1)
    plain.save_pretrained(tmp_path / "model")
    other.transformer.save_pretrained(tmp_path / "model" / "transformer", variant="fp16")
    for variant, pipe in ((None, plain), ("fp16", other)):
        opened = open_pipeline(tmp_path / "model", variant=variant)
        assert torch.equal(outputs(opened.transformer), outputs(pipe.transformer))
        assert torch.equal(opened.vae.encoder.conv_in.weight, plain.vae.encoder.conv_in.weight)


def test_a_variant_that_is_not_there(saved, original):
    refused(saved, "no weights of", "are of the variant 'fp16'", variant="fp16")
    refused("builtin", "are of the variant 'fp16'", variant="fp16")
    refused(original, "one file, which has no variants", variant="fp16", num_heads=2)


def test_a_variant_of_a_network_and_its_autoencoder_alone(pipe, tmp_path):
    place = save_variants(pipe, tmp_path / "model", "fp16")
    network, vae = place / "transformer", str(place / "vae")
    refused(network, f"in {network} are of the variant fp16 only", vae=vae)
    opened = open_pipeline(network, vae=vae, variant="fp16")
    assert torch.equal(outputs(opened.transformer), outputs(pipe.transformer))
    pipe.transformer.save_pretrained(tmp_path / "plain")
    refused(tmp_path / "plain", f"in {vae} are of the variant fp16 only", vae=vae)


def test_an_artifact_knows_the_variant_of_its_base(pipe, tmp_path):
    place = save_variants(pipe, tmp_path / "model", "fp16")
    with accelkit.enable(pipe, "4@0.5,2@1"):
        accelkit.save(pipe, tmp_path / "known", base_model=str(place), variant="fp16")
        accelkit.save(pipe, tmp_path / "unknown", base_model=str(place))
    accelkit.from_pretrained(tmp_path / "known")
    with pytest.raises(AccelkitError, match="give variant='fp16'"):
        accelkit.from_pretrained(tmp_path / "unknown")
    accelkit.from_pretrained(tmp_path / "unknown", variant="fp16")


def test_a_variant_from_the_command_line(pipe, tmp_path):
    place = str(save_variants(pipe, tmp_path / "model", "fp16"))
    given = ["sample", "--model", place, "-n", "1", "--steps", "1", "-o", str(tmp_path / "made")]
    with pytest.raises(AccelkitError, match="--variant fp16"):
        CliRunner().invoke(app, given, catch_exceptions=False)
    assert CliRunner().invoke(app, [*given, "--variant", "fp16"]).exit_code == 0
    assert (tmp_path / "made" / "grid.png").is_file()
    seen = CliRunner().invoke(app, ["inspect", "--model", place, "--variant", "fp16", "--json"])
    assert json.loads(seen.stdout)["blocks"] == 6


# --- original-layout files


@pytest.fixture
def original(make_dit, tmp_path):
    model = make_dit(layers=2)
    model.transformer_blocks[1].norm1.emb.load_state_dict(
        model.transformer_blocks[0].norm1.emb.state_dict()
    )
    save_original(model, tmp_path / "dit.safetensors", allow_inexact=True)
    return tmp_path / "dit.safetensors"


def test_an_original_file_becomes_a_pipeline(original, saved, tmp_path):
    opened = open_pipeline(original, vae=str(saved / "vae"), num_heads=2)
    assert type(opened) is DiTPipeline
    assert numerics(opened.transformer)["timestep_frequencies"] == "original"
    own = accelkit.load_original(original, num_heads=2)
    assert torch.equal(outputs(opened.transformer), outputs(own))
    vae = AutoencoderKL.from_pretrained(saved / "vae").state_dict()
    assert all(torch.equal(v, vae[k]) for k, v in opened.vae.state_dict().items())
    linear = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    assert torch.equal(opened.scheduler.alphas_cumprod, linear.alphas_cumprod)
    assert len(opened(class_labels=[0], num_inference_steps=2).images) == 1


def test_what_an_original_file_lacks_is_said(original, saved, tmp_path, monkeypatch):
    refused(original, "num_heads", vae=str(saved / "vae"))
    refused(original, "nowhere", vae=str(tmp_path / "nowhere"), num_heads=2)
    refused(original, "those of a AutoencoderKL", vae=str(saved / "transformer"), num_heads=2)
    narrow = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=3)
    narrow.save_pretrained(tmp_path / "rgb")
    refused(original, "makes 3 latent channels", vae=str(tmp_path / "rgb"), num_heads=2)
    (tmp_path / "cut.pt").write_bytes(original.read_bytes()[:500])
    refused(tmp_path / "cut.pt", "cut.pt")
    refused(tmp_path / "gone.pt", "gone.pt does not exist")
    torch.save(Evil(tmp_path / "ran"), tmp_path / "evil.pt")
    refused(tmp_path / "evil.pt", "could run code")
    assert not (tmp_path / "ran").exists()


def test_an_autoencoder_of_another_class(original, tmp_path):
    levels = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    tiny = AutoencoderTiny(**levels, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    tiny.save_pretrained(tmp_path / "tiny")
    opened = open_pipeline(original, vae=str(tmp_path / "tiny"), num_heads=2)
    assert type(opened.vae) is AutoencoderTiny
    assert torch.equal(opened.vae.decoder.layers[0].weight, tiny.decoder.layers[0].weight)
    assert opened(class_labels=[0], num_inference_steps=1).images[0].size == (16, 16)
    (tmp_path / "noisy").mkdir()
    (tmp_path / "noisy" / "config.json").write_text('{"_class_name": "ConsistencyDecoderVAE"}')
    refused(original, "ConsistencyDecoderVAE: its decoder draws noise", vae=str(tmp_path / "noisy"),
            num_heads=2)  # fmt: skip


# --- without a network


def test_reading_says_what_and_why():
    wanted = r"a/b here or from the hub: OSError: first$"
    with pytest.raises(AccelkitError, match=wanted), reading("a/b"):
        raise OSError("\n first\nsecond")
    with pytest.raises(AccelkitError, match="untouched"), reading("a/b"):
        raise AccelkitError("untouched")
    with pytest.raises(KeyboardInterrupt), reading("a/b"):
        raise KeyboardInterrupt


def test_an_unreachable_hub_is_one_line(monkeypatch, tmp_path):
    api = huggingface_hub.constants
    monkeypatch.setattr(api, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", "http://127.0.0.1:9")
    monkeypatch.setattr(
        api, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}"
    )
    monkeypatch.setattr(api, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's attempts
    refused("me/model", "cannot read the model me/model here or from the hub")
    with pytest.raises(AccelkitError, match="me/model here or from the hub"):
        accelkit.from_pretrained("me/model")


def test_a_config_of_an_unknown_class_is_noticed(make_pipe, tmp_path):
    make_pipe().save_pretrained(tmp_path)
    path = tmp_path / "transformer" / "config.json"
    config = json.loads(path.read_text())
    for known in ("DiTTransformer2DModel", "Transformer2DModel"):  # the latter by older diffusers
        path.write_text(json.dumps(config | {"_class_name": known}))
        accelkit.from_pretrained(tmp_path)
    path.write_text(json.dumps(config | {"_class_name": "os.system"}))
    with pytest.warns(AccelkitWarning, match=r"of a class 'os\.system', opened as"):
        accelkit.from_pretrained(tmp_path)
