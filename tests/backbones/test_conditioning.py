"""How networks are called: as diffusers' own pipelines call them, argument by argument."""

import copy
import functools
import inspect

import pytest
import text_pipes
import torch
from diffusers import (
    AuraFlowPipeline,
    DDIMScheduler,
    UNet2DConditionModel,
    UNet2DModel,
    WanTransformer3DModel,
)
from diffusers.models.modeling_utils import ModelMixin

from accelkit.backbones import Backbone, backbone_of, denoiser_of
from accelkit.backbones.conditioning import (
    Captions,
    Conditioning,
    _known,
    conditioning_of,
    register_conditioning,
)
from accelkit.backbones.watched import LEARNED, WatchedCaptions, learn, watch
from accelkit.errors import AccelkitError
from accelkit.sample.generate import Sampling

PROMPT = "a red bird"
OPTIONS = {
    "pixart": {"use_resolution_binning": False, "height": 16, "width": 16},
    "sd3": {"height": 16, "width": 16},
    "flux": {"height": 16, "width": 16},
    "hunyuan": {
        "use_resolution_binning": False,
        "height": 64,
        "width": 64,
        "original_size": (64, 64),
        "target_size": (64, 64),
    },
    "sana": {"use_resolution_binning": False, "height": 32, "width": 32},
    "sd": {"height": 16, "width": 16},
    "sdxl": {"height": 64, "width": 64},
    "wan": {"height": 64, "width": 64, "num_frames": 1},
    "auraflow": {"height": 16, "width": 16},
    "lumina2": {"height": 16, "width": 16, "cfg_normalization": False},
}


class Stack(Backbone):
    """Any family, for tests that do not depend on it."""

    family = "stack"

    @property
    def blocks(self):
        return next(m for m in self.model.children() if isinstance(m, torch.nn.ModuleList))


def recorded(pipe, family, latents):
    """The arguments and the output of the pipeline's network at its only step."""
    seen = []
    model = denoiser_of(pipe)
    handle = model.register_forward_hook(
        lambda module, args, kwargs, output: seen.append((args, kwargs, output[0])),
        with_kwargs=True,
    )
    if family == "flux":
        latents = pipe._pack_latents(latents, 1, 4, 8, 8)
    if family == "wan":
        latents = latents.unsqueeze(2)
    guidance = {} if family == "flux" else {"guidance_scale": 2.0}
    pipe(
        PROMPT,
        latents=latents,
        num_inference_steps=1,
        output_type="latent",
        **guidance,
        **OPTIONS[family],
    )
    handle.remove()
    if family in ("wan", "lumina2"):  # with and without the prompt, one after the other
        seen = [_joined(seen)]
    args, kwargs, output = seen[0]
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    return dict(zip(names, args, strict=False)) | kwargs, output


def _joined(seen):
    """Calls with the prompt and without it, as one of both, the latter first as others have it."""
    (_, given, output), (_, without, other) = seen
    both = {
        name: torch.cat([without[name], value]) if isinstance(value, torch.Tensor) else value
        for name, value in given.items()
    }
    return (), both, torch.cat([other, output])


def conditioning(pipe, by_watching=False):
    if by_watching:
        return WatchedCaptions(backbone_of(denoiser_of(pipe)), watch(pipe))
    model = denoiser_of(pipe)
    kind = _known[type(model).__name__]
    try:
        return kind(backbone_of(model))
    except AccelkitError:
        return kind(Stack(model))


def same(ours, theirs, name):
    if isinstance(ours, dict):
        for key, value in ours.items():
            same(value, theirs[key], f"{name}.{key}")
    elif isinstance(ours, (tuple, list)):
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            same(*pair, f"{name}[{i}]")
    elif ours is None:
        assert theirs is None, name
    else:
        theirs = torch.as_tensor(theirs).to(ours.dtype)
        torch.testing.assert_close(ours, theirs.expand_as(ours), msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize(
    ("family", "by_watching"),
    [
        *((family, False) for family in text_pipes.FAMILIES),
        *((family, True) for family in ("auraflow", "lumina2", "sd3", "sd")),
    ],
)
def test_a_call_is_the_pipelines_own(family, by_watching):
    pipe = text_pipes.make(family)
    if family == "sdxl":  # whose own scheduler scales the latents
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    calls = conditioning(pipe, by_watching)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    theirs, output = recorded(pipe, family, latents)
    items = [PROMPT] if family == "flux" else [None, PROMPT]
    doubled = latents.expand(len(items), -1, -1, -1)
    t = pipe.scheduler.timesteps[:1].expand(len(items))
    ours = calls.arguments(doubled, t, calls.encode(pipe, items))
    for name, value in ours.items():
        same(value, theirs[name], name)
    ours_alone = {k for k, v in theirs.items() if v is not None} - set(ours)
    assert ours_alone <= {"return_dict", "joint_attention_kwargs", "attention_kwargs"}
    with torch.no_grad():
        predicted = calls.prediction(denoiser_of(pipe)(**ours, return_dict=False)[0], doubled)
    if family == "flux":
        output = pipe._unpack_latents(output, 16, 16, pipe.vae_scale_factor)
    if family == "lumina2":  # whose scheduler is given the opposite
        output = -output
    output = output.reshape(predicted.shape)  # without the axis of frames
    torch.testing.assert_close(predicted, output, rtol=1e-4, atol=1e-5)


class EnoughError(Exception):
    """The pipeline's first call of its network has been seen."""


def given(pipe, **options):
    """The arguments of the pipeline's network at its first step."""
    seen = []

    def record(module, args, kwargs):
        seen.append(kwargs)
        raise EnoughError

    handle = denoiser_of(pipe).register_forward_pre_hook(record, with_kwargs=True)
    with pytest.raises(EnoughError):
        pipe(PROMPT, num_inference_steps=1, output_type="latent", **options)
    handle.remove()
    return seen[0]


def sized(family, levels):
    """A pipeline that states the size of its pictures, whose latents are 2^(levels - 1) pixels."""
    pipe = text_pipes.make(family)
    parts = {**pipe.components, "vae": text_pipes.vae(levels=levels, shift=None)}
    if family == "pixart":  # which states the size at 128 latents a side only
        config = {"sample_size": 128, "attention_head_dim": 12, "use_additional_conditions": None}
        config = {**pipe.transformer.config, **config, "num_layers": 1, "cross_attention_dim": 24}
        parts["transformer"] = type(pipe.transformer).from_config(config)
    pipe = type(pipe)(**parts, **({"add_watermarker": False} if family == "sdxl" else {}))
    pipe.set_progress_bar_config(disable=True)
    return pipe


SIZES = {
    "sdxl": ({}, lambda call: call["added_cond_kwargs"]["time_ids"]),
    "pixart": (
        {"use_resolution_binning": False},
        lambda call: torch.cat(list(call["added_cond_kwargs"].values()), dim=1),
    ),
    "hunyuan": ({"use_resolution_binning": False}, lambda call: call["image_meta_size"]),
}


@pytest.mark.parametrize("levels", [2, 4])
@pytest.mark.parametrize("family", SIZES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 2)])
def test_the_size_that_a_pipeline_states(family, levels, shape):
    pipe = sized(family, levels)
    options, size = SIZES[family]
    calls = conditioning(pipe)
    height, width = (of * side for of, side in zip(shape, calls.shape[1:], strict=True))
    pixels = {"height": height * 2 ** (levels - 1), "width": width * 2 ** (levels - 1)}
    options = {**options, **(pixels if shape != (1, 1) else {})}
    if family == "hunyuan":  # which would state an original of 1024 pixels whatever it makes
        options |= {"original_size": tuple(pixels.values())}
    theirs = size(given(pipe, **options))
    latents = torch.zeros(1, 4, height, width)
    ours = calls.arguments(latents, torch.ones(1), calls.encode(pipe, [PROMPT]))
    assert size(ours).tolist() == theirs[-1:].tolist()
    # and so without a prompt, as training does, which takes them from a cache
    of_training = type(calls)(calls.backbone)
    of_training.read_factor(pipe)
    rows = calls.encode(pipe, [PROMPT])
    assert (
        size(of_training.arguments(latents, torch.ones(1), rows)).tolist() == theirs[-1:].tolist()
    )


def test_the_size_that_a_pipeline_states_with_another_autoencoder():
    """The pipeline keeps the factor of the autoencoder that it was made with."""
    pipe = sized("sdxl", 4)
    pipe.vae = text_pipes.vae(levels=3, shift=None)
    calls = conditioning(pipe)
    ours = calls.arguments(torch.zeros(1, 4, 8, 8), torch.ones(1), calls.encode(pipe, [PROMPT]))
    theirs = SIZES["sdxl"][1](given(pipe))
    assert SIZES["sdxl"][1](ours).tolist() == theirs[-1:].tolist() == [[64, 64, 0, 0, 64, 64]]
    assert calls.pixels(pipe) == 32  # of what it makes


def test_a_size_needs_a_pipeline():
    pipe = sized("sdxl", 3)
    rows = conditioning(pipe).encode(pipe, [PROMPT])
    call = torch.zeros(1, 4, 8, 8), torch.ones(1), rows
    with pytest.raises(AccelkitError, match=r"conditioning_of\(backbone, pipe\)"):
        conditioning(pipe).arguments(*call)
    calls = conditioning_of(backbone_of(pipe.unet), pipe)
    times = calls.arguments(*call)["added_cond_kwargs"]["time_ids"]
    assert times.tolist() == [[32, 32, 0, 0, 32, 32]]


@pytest.mark.parametrize(
    ("family", "learned"),
    [
        ("pixart", True),
        ("sd3", False),
        ("flux", False),
        ("hunyuan", True),
        ("sd", False),
        ("wan", False),
    ],
)
def test_a_learned_variance_is_seen(family, learned):
    assert conditioning(text_pipes.make(family)).learns_variance is learned


def test_rows_of_half_precision_encoders_join_the_latents():
    calls = conditioning(text_pipes.make("pixart"))
    rows = {"states": torch.ones(2, 3, dtype=torch.bfloat16), "mask": torch.ones(2, 3).long()}
    call = calls.arguments(torch.zeros(2, 4, 8, 8), torch.tensor([1, 2]), rows)
    assert call["states"].dtype == torch.float32
    assert call["mask"].dtype == torch.int64


def test_the_scale_of_the_timestep():
    calls = conditioning(text_pipes.make("sana"))
    call = calls.arguments(torch.zeros(2, 4, 8, 8), torch.tensor([10.0, 600.0]), {})
    assert call["timestep"].tolist() == [5.0, 300.0]


def test_classes(pipe):
    calls = conditioning_of(backbone_of(pipe.transformer))
    assert not calls.text
    assert calls.encode(pipe, [3, None])["class_labels"].tolist() == [3, 1000]
    with pytest.raises(AccelkitError, match="classes 0 to 999, got 1001"):
        calls.encode(pipe, [1001])
    with pytest.raises(AccelkitError, match="classes 0 to 999, got a bird"):
        calls.encode(pipe, ["a bird"])


def test_a_caption_is_no_class():
    pipe = text_pipes.make("pixart")
    with pytest.raises(AccelkitError, match="prompted by text, got class 3"):
        conditioning(pipe).encode(pipe, [3])


def test_a_network_without_conditions():
    network = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    calls = conditioning_of(Stack(network))
    assert calls.shape == (3, 8, 8)
    assert calls.encode(None, [None, None]) == {}
    call = calls.arguments(torch.zeros(2, 3, 8, 8), torch.tensor([1, 2]), {})
    assert set(call) == {"sample", "timestep"}


class Strange(ModelMixin):
    """Takes an argument of unknown meaning."""

    def forward(self, hidden_states, timestep, melody, class_labels=None):
        raise AssertionError


class Listener(Captions):
    returns = ("melody",)


def test_a_network_whose_call_is_not_known():
    with pytest.raises(AccelkitError, match="what melody is to hold is not known") as caught:
        conditioning_of(Stack(Strange()))
    assert "\n" not in str(caught.value)


def test_watching_leaves_the_pipeline_as_it_was():
    pipe = text_pipes.make("auraflow")
    scheduler, before = pipe.scheduler, [dict(vars(part)) for part in (pipe, pipe.transformer)]
    state = dict(vars(scheduler))
    drawn = torch.random.get_rng_state()
    learn(pipe)
    assert vars(pipe).items() >= before[0].items()  # it notes its last call itself
    assert pipe.scheduler is scheduler
    assert vars(scheduler) == state
    assert torch.equal(torch.random.get_rng_state(), drawn)
    added = {name for name in vars(pipe.transformer) if name not in before[1]}
    assert added == {LEARNED}
    # and the network runs as it did, a copy of it as well
    for model in (pipe.transformer, copy.deepcopy(pipe.transformer)):
        assert isinstance(conditioning_of(backbone_of(model)), WatchedCaptions)
        with torch.no_grad():
            given = {"encoder_hidden_states": torch.zeros(1, 5, 16), "timestep": torch.ones(1)}
            assert model(torch.zeros(1, 4, 8, 8), **given).sample.shape == (1, 4, 8, 8)


def test_what_is_known_is_not_watched(pipe):
    for known in (pipe, text_pipes.make("sd3")):
        learn(known)
        assert LEARNED not in vars(denoiser_of(known))


class Grows(AuraFlowPipeline):
    """Pads prompts to the longest in a call."""

    def encode_prompt(self, prompt, *args, **kwargs):
        states, *rest = super().encode_prompt(prompt, *args, **kwargs)
        return states[:, : max(map(len, prompt)) + 1], *rest


class Squares(AuraFlowPipeline):
    """Gives its network another function of the timestep."""

    @functools.wraps(AuraFlowPipeline.__call__)
    def __call__(self, *args, **kwargs):
        forward = self.transformer.forward
        self.transformer.forward = lambda sample, timestep, **rest: forward(
            sample, timestep=timestep**2, **rest
        )
        return super().__call__(*args, **kwargs)


class Doubles(AuraFlowPipeline):
    """Changes the prediction before the scheduler gets it."""

    @functools.wraps(AuraFlowPipeline.__call__)
    def __call__(self, *args, **kwargs):
        step = self.scheduler.step
        self.scheduler.step = lambda output, *rest, **options: step(2 * output, *rest, **options)
        return super().__call__(*args, **kwargs)


class Paints(AuraFlowPipeline):
    """Needs an image next to a prompt."""

    def __call__(self, prompt=None, image=None, num_inference_steps=3):
        raise ValueError("give an image")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Grows, "its encoder_hidden_states grow with the prompt"),
        (Squares, "it is given the timesteps .* where its scheduler has"),
        (Doubles, "its output is not what the scheduler was given"),
        (Paints, "it does not run on prompts alone: give an image"),
    ],
)
def test_what_watching_cannot_make_out_is_refused(kind, words):
    pipe = kind(**text_pipes.make("auraflow").components)
    with pytest.raises(AccelkitError, match=f"cannot call a AuraFlow.* was watched, but {words}"):
        learn(pipe)
    assert LEARNED not in vars(pipe.transformer)


def test_prompts_that_a_learned_pipeline_chokes_on(monkeypatch):
    pipe = text_pipes.make("auraflow")
    learn(pipe)
    calls = conditioning_of(backbone_of(pipe.transformer))
    monkeypatch.setattr(pipe, "encode_prompt", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(AccelkitError, match=r"cannot embed captions by AuraFlow.*division by zero"):
        calls.encode(pipe, ["a bird"])


def test_registering_one(monkeypatch):
    monkeypatch.setattr("accelkit.backbones.conditioning._known", {})
    register_conditioning(Strange, Listener)
    assert isinstance(conditioning_of(Stack(Strange())), Listener)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"addition_embed_type": "text", "encoder_hid_dim": 8},
            "conditions of the kind 'text' next to text",
        ),
        ({"in_channels": 9}, "takes 9 channels and returns 4; it needs an image or a mask"),
    ],
    ids=["IF", "inpainting"],
)
def test_conditions_beside_text_are_refused(options, words):
    network = UNet2DConditionModel(
        block_out_channels=(8,),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("UpBlock2D",),
        cross_attention_dim=8,
        attention_head_dim=4,
        **options,
    )
    with pytest.raises(AccelkitError, match=words) as caught:
        conditioning_of(backbone_of(network))
    assert "\n" not in str(caught.value)


def test_a_refiner_is_refused():
    pipe = text_pipes.make("sdxl")
    assert Sampling().check(pipe).sampler == "ddim"
    pipe.register_to_config(requires_aesthetics_score=True)
    with pytest.raises(AccelkitError, match="gives its network an aesthetic score"):
        Sampling().check(pipe)


def test_an_empty_prompt_of_a_pipeline_that_embeds_it():
    pipe = text_pipes.make("sdxl")
    assert not any(v.any() for v in conditioning(pipe).encode(pipe, [None]).values())
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    states, _, pooled, _ = pipe.encode_prompt("", do_classifier_free_guidance=False)
    rows = conditioning(pipe).encode(pipe, [None])
    assert torch.equal(rows["encoder_hidden_states"], states)
    assert torch.equal(rows["text_embeds"], pooled)


def test_an_image_beside_a_video_is_refused():
    config = text_pipes.make("wan").transformer.config
    network = WanTransformer3DModel.from_config({**config, "in_channels": 12})
    with pytest.raises(AccelkitError, match="takes 12 channels and returns 4"):
        conditioning_of(backbone_of(network))


def test_pipelines_that_call_wan_in_another_way_are_refused():
    pipe = text_pipes.make("wan")
    assert Sampling().check(pipe).sampler == "flow"
    assert conditioning_of(backbone_of(pipe.transformer)).pixels(pipe) == 512
    pipe.register_to_config(expand_timesteps=True)
    with pytest.raises(AccelkitError, match="WanPipeline gives its network a timestep for every"):
        Sampling().check(pipe)
    pipe.register_modules(transformer_2=pipe.transformer)
    with pytest.raises(AccelkitError, match="WanPipeline has two networks, one for high noise"):
        Sampling().check(pipe)


def test_classes_without_a_null_class(pipe, monkeypatch):
    backbone = backbone_of(pipe.transformer)
    monkeypatch.setattr(type(backbone), "null_class", None)
    monkeypatch.setattr(type(backbone), "num_classes", 10)
    calls = Conditioning(backbone)
    assert calls.encode(pipe, [0, 9])["class_labels"].tolist() == [0, 9]
    with pytest.raises(AccelkitError, match="classes 0 to 9, got 10"):
        calls.encode(pipe, [10])
    with pytest.raises(AccelkitError, match="never trained without labels"):
        calls.encode(pipe, [None])


def test_u_vit_is_given_its_own_number():
    """999 t of the continuous process, whose timesteps are 1000 t - 1."""
    from accelkit.models import UViTTransformer2DModel

    network = UViTTransformer2DModel(
        sample_size=8,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_classes=10,
        timestep_scale=0.999,
        timestep_offset=0.999,
    )
    calls = conditioning_of(backbone_of(network))
    t = torch.tensor([0.0, 0.25, 1.0])
    rows = calls.encode(None, [0, 9, 3])
    call = calls.arguments(torch.zeros(3, 3, 8, 8), 1000 * t - 1, rows)
    torch.testing.assert_close(call["timestep"], 999 * t, rtol=1e-5, atol=1e-4)
    assert network(**call).sample.shape == (3, 3, 8, 8)
    with pytest.raises(AccelkitError, match="never trained without labels"):
        calls.encode(None, [None])
