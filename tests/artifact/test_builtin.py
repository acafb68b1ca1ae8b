"""The model that comes with the package: its form, its size, and that it draws digits."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline
from safetensors import safe_open

import accelkit
from accelkit.backbones import backbone_of
from accelkit.layouts.original import numerics
from accelkit.metrics.extractors import open_extractor
from accelkit.sample.generate import Sampling, generate


@pytest.fixture(scope="module")
def pipe():
    """As plain diffusers loads it."""
    pipe = DiTPipeline.from_pretrained(accelkit.builtin())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def recognised(images, labels):
    return (
        open_extractor("digits").extract(images)["probabilities"].argmax(axis=1) == np.array(labels)
    ).mean()


def test_it_is_dit_xl_2_made_narrow(pipe):
    config = pipe.transformer.config
    assert config.num_layers == 28
    assert config.num_embeds_ada_norm == 1000
    assert (config.in_channels, config.out_channels) == (4, 8)
    assert config.patch_size == 2
    assert config.norm_type == "ada_norm_zero"
    assert pipe.vae.config.latent_channels == 4
    assert len(pipe.transformer.transformer_blocks) == 28
    assert backbone_of(pipe.transformer).null_class == 1000
    assert numerics(pipe.transformer)["timestep_frequencies"] == "diffusers"


def test_its_process_is_the_linear_one(pipe):
    assert type(pipe.scheduler) is DDIMScheduler
    betas = np.linspace(1e-4, 0.02, 1000)
    np.testing.assert_allclose(pipe.scheduler.alphas_cumprod, np.cumprod(1 - betas), rtol=1e-4)
    assert pipe.scheduler.config.prediction_type == "epsilon"
    assert pipe.scheduler.config.clip_sample is False


def test_its_files_are_small_and_in_half_precision():
    files = [p for p in accelkit.builtin().rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 10_000_000
    tensors = [p for p in files if p.suffix == ".safetensors"]
    assert len(tensors) == 2
    for path in tensors:
        with safe_open(path, "pt") as file:
            kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        assert kinds == {"F16"}
    assert {p.suffix for p in files} == {".json", ".safetensors"}


def test_its_classes_are_the_digits(pipe):
    assert pipe.labels == {str(i): i for i in range(10)}
    assert pipe.get_label_ids(["3", "1"]) == [3, 1]
    index = json.loads((accelkit.builtin() / "model_index.json").read_text())
    assert len(index["id2label"]) == 10


def test_nothing_in_it_tells_where_it_was_made():
    for path in accelkit.builtin().rglob("*.json"):
        config = json.loads(path.read_text())
        assert not str(config.get("_name_or_path", "")).startswith("/"), path


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_plain_diffusers_samples_with_it(pipe, guidance):
    images = pipe(
        class_labels=[3, 1],
        guidance_scale=guidance,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
    ).images
    assert [image.size for image in images] == [(32, 32)] * 2


def test_the_classifier_tells_the_digits_apart():
    from accelkit.data.digits import digits

    images, labels = digits()  # else the next test would say nothing
    assert recognised(images[:400], labels[:400]) > 0.95
    assert recognised(images[:400], (labels[:400] + 1) % 10) < 0.05


def test_it_draws_the_digits_it_is_asked_for(pipe):
    labels = [i % 10 for i in range(40)]
    images = generate(pipe, labels, list(range(40)), Sampling("ddim", 20, 2.0))
    assert recognised(images, labels) >= 0.9
    assert np.isfinite(images).all()
    spread = np.stack([images[i::10].astype(float).std(axis=0).mean() for i in range(10)])
    assert (spread > 5).all()  # and not the same one every time
