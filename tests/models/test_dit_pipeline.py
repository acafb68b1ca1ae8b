"""Label tables of any size: diffusers' own pipeline, given the same rows where it expects them."""

import argparse
import json
import threading

import diffusers
import numpy as np
import pytest
import text_pipes
import torch

import accelkit
from accelkit.artifact.loading import open_pipeline
from accelkit.backbones import backbone_of
from accelkit.errors import AccelkitError
from accelkit.layouts.original import load_original, save_original, to_original
from accelkit.models import DiTPipeline
from accelkit.sample.generate import Sampling, generate

LABELS = [0, 1, 2]


def network(classes, channels=4, layers=4):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = diffusers.DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=channels,
            out_channels=2 * channels,
            num_layers=layers,
            sample_size=8,
            norm_eps=1e-6,
            num_embeds_ada_norm=classes,
        )
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        torch.nn.init.normal_(tables(model)[0].weight)  # so that classes differ
    shared = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(shared)
    return model.eval()


def tables(model):
    return [block.norm1.emb.class_embedder.embedding_table for block in model.transformer_blocks]


def with_rows(model, rows):
    """The network with a table of 1,000 classes: ``rows`` of its own, the last one the null."""
    own = tables(model)[0].weight.detach()
    config = {**model.config, "num_embeds_ada_norm": 1000}
    other = diffusers.DiTTransformer2DModel.from_config(config)
    accelkit.layouts.dit.restore_numerics(other)
    state = {k: v for k, v in model.state_dict().items() if "embedding_table" not in k}
    other.load_state_dict(state, strict=False)
    for table in tables(other):
        with torch.no_grad():
            table.weight.zero_()
            table.weight[: len(rows) - 1] = own[rows[:-1]]
            table.weight[1000] = own[rows[-1]]
    return other.eval()


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return text_pipes.filled(text_pipes.vae(levels=1, shift=None), 0.3)


@pytest.fixture
def place(vae, tmp_path):
    vae.save_pretrained(tmp_path / "vae")
    return str(tmp_path / "vae")


def written(model, path, **more):
    """An original-layout file of the network."""
    if more:
        torch.save({"ema": to_original(model, allow_inexact=True), **more}, path)
    else:
        save_original(model, path, allow_inexact=True)
    return path


def pictures(pipe, labels=LABELS, **options):
    pipe.set_progress_bar_config(disable=True)
    draw = torch.Generator().manual_seed(1)
    options = {"num_inference_steps": 3, "output_type": "np", "generator": draw, **options}
    return pipe(class_labels=labels, **options).images


def theirs(model, vae, labels=LABELS, **options):
    pipe = diffusers.DiTPipeline(model, vae, diffusers.DDIMScheduler(clip_sample=False))
    pipe.scheduler = open_pipeline("builtin").scheduler  # the process that DiTs are trained on
    return pictures(pipe, labels, **options)


@pytest.mark.parametrize("classes", [3, 999, 1001])
def test_a_table_of_any_size_is_guided_away_from_its_last_row(classes, vae, place, tmp_path):
    pipe = open_pipeline(written(network(classes), tmp_path / "dit.pt"), vae=place, num_heads=2)
    assert isinstance(pipe, diffusers.DiTPipeline)
    last = classes - 1
    rows = [0, 1, last, classes]
    expected = theirs(with_rows(pipe.transformer, rows), vae)
    own = pictures(pipe, [0, 1, last])  # at the default guidance, 4
    np.testing.assert_allclose(own, expected, atol=1e-5)
    unguided = theirs(with_rows(pipe.transformer, rows), vae, guidance_scale=1.0)
    np.testing.assert_allclose(
        pictures(pipe, [0, 1, last], guidance_scale=1.0), unguided, atol=1e-5
    )
    assert np.abs(own - unguided).max() > 0.05
    # without a row for no label at all, which is one of the classes here
    wrong = theirs(with_rows(pipe.transformer, [0, 1, last, last]), vae)
    assert np.abs(own - wrong).max() > 0.05


def test_a_thousand_classes_are_left_to_diffusers(vae, place, tmp_path):
    pipe = open_pipeline(written(network(1000), tmp_path / "dit.pt"), vae=place, num_heads=2)
    assert type(pipe) is diffusers.DiTPipeline
    ours = DiTPipeline(**pipe.components)
    for scale in (1.0, 4.0):
        options = {"guidance_scale": scale}
        assert np.array_equal(pictures(ours, **options), pictures(pipe, **options))


def test_accelkits_sampler_agrees(place, tmp_path):
    pipe = open_pipeline(written(network(10), tmp_path / "dit.pt"), vae=place, num_heads=2)
    draws = [torch.Generator().manual_seed(seed) for seed in (0, 1, 2)]
    own = pictures(pipe, generator=draws, num_inference_steps=4)
    ours = generate(pipe, LABELS, [0, 1, 2], Sampling("ddim", 4, guidance=4.0))
    assert np.abs(ours.astype(int) - (own * 255).round()).max() <= 1


def test_it_survives_saving(place, tmp_path):
    path = written(network(10), tmp_path / "dit.pt")
    pipe = accelkit.from_pretrained(path, vae=place, num_heads=2)
    full = pictures(pipe)
    pipe.save_pretrained(tmp_path / "pipeline")
    assert np.array_equal(pictures(accelkit.from_pretrained(tmp_path / "pipeline")), full)
    # diffusers opens the same files; its own pipeline guides with 1,000 classes only
    plain = diffusers.DiTPipeline.from_pretrained(tmp_path / "pipeline")
    accelkit.layouts.dit.restore_numerics(plain.transformer)
    unguided = {"guidance_scale": 1.0}
    np.testing.assert_allclose(pictures(plain, **unguided), pictures(pipe, **unguided), atol=1e-6)
    with pytest.raises(IndexError):
        pictures(plain)

    with accelkit.enable(pipe, "4@0.5,2@1"):
        cut = pictures(pipe)
        accelkit.save(pipe, tmp_path / "tuned", base_model=path, vae=place, num_heads=2)
    assert np.abs(cut - full).max() > 0.01
    assert np.array_equal(pictures(accelkit.from_pretrained(tmp_path / "tuned")), cut)

    load_original(path, num_heads=2).save_pretrained(tmp_path / "alone")
    assert np.array_equal(pictures(open_pipeline(tmp_path / "alone", vae=place)), full)


def refused(call, *words):
    with pytest.raises(AccelkitError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) <= 400
    for word in words:
        assert word in message


def test_the_model_card_of_a_table_of_two(place, tmp_path):
    path = written(network(2), tmp_path / "dit.pt")
    pipe = open_pipeline(path, vae=place, num_heads=2)
    with accelkit.enable(pipe, "4@0.5,2@1"):
        accelkit.save(pipe, tmp_path / "tuned", base_model=path, vae=place, num_heads=2)
    assert "pipe(class_labels=[0, 1]).images" in (tmp_path / "tuned" / "README.md").read_text()


def test_a_label_that_the_table_lacks_is_refused(place, tmp_path):
    pipe = open_pipeline(written(network(10), tmp_path / "dit.pt"), vae=place, num_heads=2)
    for label in (-1, 11, 1000):
        refused(lambda label=label: pipe([0, label]), "classes 0 to 9", f"got {label}")
    # the null class may be asked for, as with diffusers
    assert pictures(pipe, [10], guidance_scale=1.0).shape == (1, 8, 8, 3)


@pytest.mark.parametrize("how", ["argument", "checkpoint"])
def test_a_table_without_a_null_class_is_not_guided(how, vae, place, tmp_path):
    model = network(9)  # ten rows
    path = tmp_path / "dit.pt"
    if how == "checkpoint":  # of a training without label dropout, which says so itself
        written(model, path, args=argparse.Namespace(num_classes=10, model="DiT-S/2"))
        pipe = open_pipeline(path, vae=place, num_heads=2)
    else:
        written(model, path)
        load_original(path, num_heads=2, null_class=None).save_pretrained(tmp_path / "alone")
        assert json.loads((tmp_path / "alone" / "config.json").read_text())["null_class"] is None
        pipe = open_pipeline(tmp_path / "alone", vae=place)
    pipe.save_pretrained(tmp_path / "pipeline")
    for each in (pipe, open_pipeline(tmp_path / "pipeline")):
        backbone = backbone_of(each.transformer)
        assert (backbone.num_classes, backbone.null_class) == (10, None)
        refused(lambda each=each: each(LABELS), "never trained without labels", "guidance_scale=1")
        guided = Sampling("ddim", 2, guidance=2.0)
        refused(
            lambda each=each, how=guided: generate(each, [9], [0], how),
            "never trained without labels",
        )
        with accelkit.enable(each, "4@0.5,2@1"):
            accelkit.save(each, tmp_path / "tuned", base_model=str(path), vae=place, num_heads=2)
        card = (tmp_path / "tuned" / "README.md").read_text()
        assert "pipe(class_labels=[0, 1, 2], guidance_scale=1).images" in card
        expected = theirs(with_rows(each.transformer, [8, 9, 0]), vae, [0, 1], guidance_scale=1.0)
        own = pictures(each, [8, 9], guidance_scale=1.0)
        np.testing.assert_allclose(own, expected, atol=1e-5)
        assert generate(each, [9], [0], Sampling("ddim", 2)).shape == (1, 8, 8, 3)


def test_a_training_checkpoint_with_a_null_class(place, tmp_path):
    path = written(network(10), tmp_path / "dit.pt", args=argparse.Namespace(num_classes=10))
    pipe = open_pipeline(path, vae=place, num_heads=2)
    assert backbone_of(pipe.transformer).null_class == 10


def test_another_null_class_contradicts_the_file(tmp_path):
    path = written(network(10), tmp_path / "dit.pt")
    assert backbone_of(load_original(path, num_heads=2, null_class=10)).null_class == 10
    refused(
        lambda: load_original(path, num_heads=2, null_class=3),
        "null_class=3 contradicts",
        "last row, 10",
    )


def test_a_network_of_pixels_has_no_autoencoder(tmp_path):
    pipe = open_pipeline(written(network(1000, channels=3), tmp_path / "dit.pt"), num_heads=2)
    assert pipe.vae is None
    draws = [torch.Generator().manual_seed(seed) for seed in (0, 1, 2)]
    own = pictures(pipe, generator=draws, num_inference_steps=4)
    ours = generate(pipe, LABELS, [0, 1, 2], Sampling("ddim", 4, guidance=4.0))
    assert np.abs(ours.astype(int) - (own * 255).round()).max() <= 1
    pipe.save_pretrained(tmp_path / "pipeline")
    again = open_pipeline(tmp_path / "pipeline")
    assert np.array_equal(pictures(again), pictures(pipe))


def test_a_call_leaves_nothing_behind(place, tmp_path):
    pipe = open_pipeline(written(network(10), tmp_path / "dit.pt"), vae=place, num_heads=2)
    before, network_before = dict(vars(pipe)), dict(vars(pipe.transformer))
    pictures(pipe)
    with pytest.raises(TypeError):
        pictures(pipe, num_inference_steps=None)
    assert {name: vars(pipe)[name] for name in before} == before
    assert vars(pipe.transformer) == network_before


def test_calls_at_the_same_time(place, tmp_path):
    """Each with its own scheduler, as diffusers advises, guided and not."""
    pipe = open_pipeline(written(network(10), tmp_path / "dit.pt"), vae=place, num_heads=2)
    scales = [1.0, 4.0, 2.0]
    expected = [pictures(pipe, guidance_scale=scale) for scale in scales]
    found = [[] for _ in scales]

    def run(index):
        own = DiTPipeline(pipe.transformer, pipe.vae, type(pipe.scheduler)(**pipe.scheduler.config))
        for _ in range(4):
            found[index].append(pictures(own, guidance_scale=scales[index]))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(scales))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, made in enumerate(found):
        assert len(made) == 4
        for each in made:
            np.testing.assert_allclose(each, expected[index], atol=1e-6)
