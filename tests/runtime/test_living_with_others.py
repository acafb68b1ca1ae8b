"""A schedule together with what other libraries do to the model, whichever comes first."""

import copy
import io
import pickle

import accelerate
import diffusers
import pytest
import torch
from accelerate.hooks import remove_hook_from_module, remove_hook_from_submodules
from diffusers.hooks.layerwise_casting import apply_layerwise_casting
from small_models import SD3, DiT, Flux, PixArt, UViT, both, by_hand, close, each, families, outputs

from accelkit.errors import AccelkitError
from accelkit.models import UViTPipeline
from accelkit.runtime.switch import disable, enable, enabled_on

# --- weights on another device, or in another type --------------------------------------------


def offload(model):
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


@each
@families(DiT, UViT, Flux)
def test_weights_loaded_when_they_are_needed(family, first):
    model = both(family.make(), family, offload, first)
    assert next(model.parameters()).device.type == "meta"
    close(outputs(family, model), by_hand(family, family.make))
    disable(model)
    close(outputs(family, model), outputs(family, family.make()))


@each
@families(DiT, UViT)
def test_a_schedule_outlives_accelerates_hooks(family, first):
    """A pipeline that offloads its models removes the hooks after every call and puts them back."""
    hooks = []

    def offload_whole(model):
        hooks.append(accelerate.cpu_offload_with_hook(model, torch.device("cpu"))[1])

    model = both(family.make(), family, offload_whole, first)
    expected = by_hand(family, family.make)
    for _ in range(2):
        close(outputs(family, model), expected)
        hooks[-1].offload()
        remove_hook_from_module(model, recurse=True)
        close(outputs(family, model), expected)
        offload_whole(model)
    disable(model)
    close(outputs(family, model), outputs(family, family.make()))
    remove_hook_from_submodules(model)
    assert "forward" not in vars(model) or not hasattr(model.forward, "func")


def test_a_schedule_whose_hook_was_taken_off_says_so():
    family = DiT()
    model = family.make()
    enable(model, family.schedule)
    del model.forward  # as a library does that restores a forward it saved
    with pytest.raises(AccelkitError, match="took the schedule's hook off the model"):
        outputs(family, model)


@each
@families(DiT, UViT, Flux)
def test_weights_stored_in_another_type(family, first):
    def cast(model):
        model.enable_layerwise_casting(
            storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
        )
        return model

    model = both(family.make(), family, cast, first)
    stored = {p.dtype for p in model.parameters()}
    assert torch.float8_e4m3fn in stored
    close(outputs(family, model), by_hand(family, lambda: cast(family.make())))
    disable(model)
    close(outputs(family, model), outputs(family, cast(family.make())))


@families(DiT, UViT, Flux)
def test_moving_an_enabled_model(family):
    model = family.make()
    enable(model, family.schedule)
    outputs(family, model)
    model.to(torch.float64).to("cpu")
    call = family.call(900)
    call = {
        k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in call.items()
    }
    with torch.no_grad():
        found = model(**call).sample
    assert found.dtype == torch.float64
    close([found.float()], by_hand(family, family.make)[2:3])


# --- adapters --------------------------------------------------------------------------------


def lora(seed=0):
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    names = ["to_q", "to_k", "to_v"]
    return peft.LoraConfig(r=2, lora_alpha=4, target_modules=names, init_lora_weights=False)


def with_adapter(model):
    model.add_adapter(lora(), "style")
    return model


@each
@families(SD3, Flux)
def test_adapters_added_fused_and_unloaded(family, first):
    model = both(family.make(), family, with_adapter, first)
    plain = by_hand(family, family.make)
    expected = by_hand(family, lambda: with_adapter(family.make()))
    assert (expected[0] - plain[0]).abs().max() > 1e-3
    close(outputs(family, model), expected)
    model.fuse_lora()
    close(outputs(family, model), expected, 1e-4)
    model.unfuse_lora()
    close(outputs(family, model), expected, 1e-4)
    model.disable_adapters()
    close(outputs(family, model), plain, 1e-4)
    model.enable_adapters()
    model.unload_lora()
    close(outputs(family, model), plain, 1e-4)
    disable(model)
    close(outputs(family, model), outputs(family, family.make()), 1e-4)


@each
def test_adapters_loaded_from_their_weights(first, tmp_path):
    family = Flux()
    with_adapter(family.make()).save_lora_adapter(tmp_path, adapter_name="style")

    def load(model):
        model.load_lora_adapter(
            tmp_path,
            prefix=None,
            weight_name="pytorch_lora_weights.safetensors",
            adapter_name="style",
        )

    model = both(family.make(), family, load, first)
    close(outputs(family, model), by_hand(family, lambda: with_adapter(family.make())))


@each
@families(PixArt, DiT)
def test_adapters_that_peft_injects(family, first):
    def inject(model):
        pytest.importorskip("peft").inject_adapter_in_model(lora(), model)
        return model

    model = both(family.make(), family, inject, first)
    close(outputs(family, model), by_hand(family, lambda: inject(family.make())))


# --- copies ----------------------------------------------------------------------------------


def copied(thing, way):
    if way == "deepcopy":
        return copy.deepcopy(thing)
    if way == "pickle":
        return pickle.loads(pickle.dumps(thing))
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
@families(DiT, Flux)
def test_copies_of_an_enabled_model(family, way):
    model = family.make()
    enable(model, family.schedule)
    twin = copied(model, way)
    assert enabled_on(twin).backbone.model is twin
    for parameter in model.parameters():
        parameter.data.zero_()
    close(outputs(family, twin), by_hand(family, family.make))
    disable(twin)
    close(outputs(family, twin), outputs(family, family.make()))
    assert enabled_on(model) is not None


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_an_enabled_pipeline(way):
    family = UViT()
    pipe = UViTPipeline(family.make(), scheduler=diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    enable(pipe, family.schedule)
    twin = copied(pipe, way)
    twin.set_progress_bar_config(disable=True)
    call = {"class_labels": [1], "num_inference_steps": 3, "output_type": "pt"}

    def sample(which):
        return which(**call, generator=torch.Generator().manual_seed(0)).images

    expected = sample(pipe)
    for parameter in pipe.transformer.parameters():
        parameter.data.zero_()
    assert torch.equal(sample(twin), expected)
    twin.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    followed = enabled_on(twin.transformer).axis.kind == "flow matching"
    assert followed == (way == "deepcopy")  # a pickle keeps the scheduler of that time


@each
def test_copies_that_would_run_the_originals_weights_are_refused(first):
    family = DiT()

    def cast(model):
        apply_layerwise_casting(model, torch.bfloat16, torch.float32)

    model = both(family.make(), family, cast, first)
    with pytest.raises(AccelkitError, match=r"layerwise_casting.*copy it first"):
        copy.deepcopy(model)
    with pytest.raises(AccelkitError, match="original's weights"):
        pickle.dumps(model)
    close(outputs(family, model), by_hand(family, lambda: cast_on(family.make(), cast)))


def cast_on(model, cast):
    cast(model)
    return model


def test_a_pipeline_saved_while_enabled_and_offloaded_is_a_plain_one(tmp_path):
    family = UViT()
    pipe = UViTPipeline(family.make(), scheduler=diffusers.DDIMScheduler())
    enable(pipe, family.schedule)
    accelerate.cpu_offload_with_hook(pipe.transformer, torch.device("cpu"))
    pipe.save_pretrained(tmp_path)
    loaded = UViTPipeline.from_pretrained(tmp_path)
    assert enabled_on(loaded) is None
    close(outputs(family, loaded.transformer.eval()), outputs(family, family.make()))
