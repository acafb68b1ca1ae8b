"""Opens the pipeline that a name stands for: built in, a directory, a file or on the hub."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from accelkit.artifact.names import (
    ALONE,
    FETCH_AGAIN,
    Named,
    named_base,
    reading,
    refuse_original_settings,
)
from accelkit.errors import AccelkitError, AccelkitWarning
from accelkit.files.documents import read_object
from accelkit.files.tensors import check_tensors
from accelkit.models.sizes import check_configs
from accelkit.noise.axis import reference_process

ORIGINAL_VAE = "stabilityai/sd-vae-ft-ema"
"""The autoencoder DiT was evaluated with (Peebles and Xie 2023, section 4)."""


def open_pipeline(
    model: str | Path | Named,
    *,
    revision: str | None = None,
    variant: str | None = None,
    vae: str | None = None,
    num_heads: int | None = None,
) -> Any:
    """Return the pipeline that ``model`` stands for, in float32 on the CPU.

    From then on diffusers and transformers show no progress bars while components are loaded.

    Args:
        model: ``builtin``, a pipeline's directory, a DiT or U-ViT alone (an original-layout
            checkpoint, ``.pt``, ``.pth`` or ``.safetensors``, or the directory that ``accelkit
            convert`` makes of one) or a hub id. The original's numerics are restored where
            recorded.
        revision: branch, tag or commit of a hub id.
        variant: variant of the weights, as in ``diffusion_pytorch_model.fp16.safetensors``;
            components without it are opened from their plain weights.
        vae: directory or hub id of the autoencoder of a network alone.
        num_heads: attention heads of an original-layout checkpoint of unpublished size.

    Raises:
        AccelkitError: the model is missing, is not a pipeline or cannot be read; its weights come
            in other variants only, are damaged, not finite or not floating-point numbers; or
            ``vae`` or ``num_heads`` is given for something other than an original-layout
            checkpoint.
    """
    found = model if isinstance(model, Named) else named_base(model, revision)
    if found.alone:
        return _around(found, vae, num_heads, variant)
    refuse_original_settings(found.name, vae, num_heads)
    with reading(found.name):
        import diffusers.utils.logging
        import transformers.utils.logging

        for library in (diffusers, transformers):
            library.utils.logging.disable_progress_bar()
        pipe, folder = _diffusers_pipeline(found, variant)
        return _ready(pipe, found.name, folder)


def open_network(path: Path, num_heads: int | None = None, variant: str | None = None) -> Any:
    """Return a DiT or U-ViT alone in eval mode; see :func:`open_pipeline`.

    Raises:
        AccelkitError: the network cannot be read, its weights come in other variants only, or
            ``num_heads`` is given for a directory.
    """
    if not path.is_dir():
        if variant is not None:
            raise AccelkitError(f"{path} is one file, which has no variants; leave variant= out")
        from accelkit.layouts.original import load_original

        return load_original(path, num_heads=num_heads)
    refuse_original_settings(str(path), None, num_heads)
    with reading(str(path)):
        import diffusers

        from accelkit import models

        check_configs(path)
        check_tensors(path, FETCH_AGAIN)
        name = str(read_object(path / "config.json").get("_class_name"))
        kind = getattr(models, name, None) or getattr(diffusers, name)
        network = open_whole(kind, path, variant=variant)
    from accelkit.backbones import backbone_of

    backbone_of(network).restore()
    return network


def _diffusers_pipeline(found: Named, variant: str | None) -> tuple[Any, Path]:
    """Return a pipeline and the folder that it was read from."""
    import diffusers

    from accelkit import models

    load, place = diffusers.DiffusionPipeline, found.place
    folder = place
    if found.path is None:
        folder = load.download(place, revision=found.revision, variant=variant)
    index = read_object(Path(folder) / "model_index.json")
    check_configs(Path(folder))
    there = {part.name: variants(part) for part in Path(folder).iterdir() if part.is_dir()}
    for part in there:
        _check_variant(Path(folder, part), variant)
    if variant is not None and not any(variant in names for names in there.values()):
        raise AccelkitError(f"no weights of {place} are of the variant {variant!r}; leave it out")
    check_tensors(Path(folder), FETCH_AGAIN)
    given: dict[str, Any] = {}
    for part in ("transformer", "unet"):
        name = str((index.get(part) or [None])[-1])
        kind = getattr(models, name, None) or getattr(diffusers, name, None)
        if kind is not None:
            given[part] = open_whole(kind, folder, variant=variant, subfolder=part)
            _warn_of_another_class(Path(folder, part), name)
    name = str(index.get("_class_name"))
    if name == "DiTPipeline" and "transformer" in given:
        load = models.dit_pipeline_for(given["transformer"], (index.get("vae") or [None])[-1])
    else:
        load = getattr(models, name, load)
    if isinstance(names := index.get("id2label"), dict):
        # JSON has strings for keys, and diffusers warns if they are not numbers
        given["id2label"] = {int(label): name for label, name in names.items()}
    pipe = load.from_pretrained(folder, variant=variant, **given)
    pipe.register_to_config(_name_or_path=place)
    return pipe, Path(folder)


def _warn_of_another_class(folder: Path, name: str) -> None:
    """Warn if the config in ``folder`` is of a class that is neither ``name`` nor known at all."""
    import diffusers

    from accelkit import models

    own = read_object(folder / "config.json").get("_class_name", name)
    if own != name and not (hasattr(diffusers, str(own)) or hasattr(models, str(own))):
        warnings.warn(
            f"{folder / 'config.json'} is of a class {own!r}, opened as the {name} that "
            "model_index.json names; correct the one that is wrong",
            AccelkitWarning,
            stacklevel=2,
        )


def open_whole(kind: Any, place: str | Path, *, variant: str | None = None, **options: Any) -> Any:
    """Return ``kind.from_pretrained(place, **options)``, a network of diffusers, in eval mode.

    Warns of weights that the network does not have. A directory without the variant is opened from
    its plain weights.

    Raises:
        AccelkitError: the files lack weights, which diffusers would leave random, or come in other
            variants only.
    """
    folder = Path(place, options.get("subfolder", ""))
    _check_variant(folder, variant)
    if variant in variants(folder):
        options["variant"] = variant
    model, info = kind.from_pretrained(place, output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):
        raise AccelkitError(
            f"the weights in {place} are not those of a {kind.__name__} as its config describes "
            f"it: {len(missing)} are missing, e.g. {', '.join(missing[:3])}"
        )
    if extra := sorted(info["unexpected_keys"]):
        warnings.warn(
            f"{len(extra)} of the weights in {place} have no place in a {kind.__name__} as its "
            f"config describes it and are left out, e.g. {', '.join(extra[:3])}",
            AccelkitWarning,
            stacklevel=2,
        )
    return model


_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)"
    r"(?:\.(?P<variant>[^.]+?))?(?:-\d{5}-of-\d{5})?(?:\.(?P<older>[^.]+))?\.(?:safetensors|bin)"
)


def variants(folder: Path) -> set[str]:
    """Return the variants of the weights in a component's directory, "" for plain weights."""
    if not folder.is_dir():
        return set()
    found = (_WEIGHTS.fullmatch(path.name) for path in folder.iterdir())
    return {match["variant"] or match["older"] or "" for match in found if match}


def _check_variant(folder: Path, variant: str | None) -> None:
    """Raise AccelkitError if a component's weights come in other variants than ``variant`` only."""
    found = sorted(variants(folder))
    if not found or "" in found or variant in found:
        return
    raise AccelkitError(
        f"the weights in {folder} are of the variant {' and '.join(found)} only; give "
        f"variant={found[0]!r} (--variant {found[0]})"
    )


def _around(found: Named, vae: str | None, num_heads: int | None, variant: str | None) -> Any:
    """Return a pipeline around a network alone."""
    from accelkit.backbones.autoencoders import channels_of

    path = found.path
    assert path is not None
    transformer = open_network(path, num_heads, variant).float()
    channels = transformer.config.in_channels
    autoencoder = None
    if channels != _PIXELS or vae is not None:
        autoencoder = open_autoencoder(vae or ORIGINAL_VAE, variant)
        if (made := channels_of(autoencoder)) != channels:
            raise AccelkitError(
                f"the autoencoder {vae or ORIGINAL_VAE} makes {made} latent channels, {path} takes "
                f"{channels}; give its own"
            )
    pipe = _PIPELINES[type(transformer).__name__](transformer, autoencoder)
    return _ready(pipe, str(path), path if path.is_dir() else None)


def open_autoencoder(place: str, variant: str | None = None) -> Any:
    """Return the autoencoder of a directory or hub id, of the class that its config names.

    Raises:
        AccelkitError: it cannot be read, or accelkit cannot map pictures by its class.
    """
    with reading(place):
        import diffusers

        from accelkit.backbones.autoencoders import kind_of_class

        if Path(place).is_dir():
            check_configs(Path(place))
        named = diffusers.AutoencoderKL.load_config(place).get("_class_name")
        kind: Any = getattr(diffusers, str(named), None)
        if not hasattr(kind, "encode"):  # not an autoencoder, as loading the weights will say
            kind = diffusers.AutoencoderKL
        kind_of_class(kind)
        return open_whole(kind, place, variant=variant)


_PIXELS = 3  # channels of a network without an autoencoder


def _dit_pipeline(transformer: Any, vae: Any) -> Any:
    from accelkit.models import dit_pipeline_for

    return dit_pipeline_for(transformer, vae)(transformer, vae, reference_process())


def _uvit_pipeline(transformer: Any, vae: Any) -> Any:
    from diffusers import DDIMScheduler

    from accelkit.models import UViTPipeline
    from accelkit.noise.vp_sde import VPSDEEulerMaruyamaScheduler

    discrete = transformer.config.timestep_scale == 1  # the H models, on Stable Diffusion's betas
    scheduler = (
        DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
        )
        if discrete
        else VPSDEEulerMaruyamaScheduler()
    )
    return UViTPipeline(transformer, scheduler, vae)


_PIPELINES = dict(zip(ALONE, (_dit_pipeline, _uvit_pipeline), strict=True))
"""The pipelines of networks alone, by class."""


def _ready(pipe: Any, name: str, folder: Path | None) -> Any:
    """Check a pipeline and its weights, restore its numerics and switch off its progress bar."""
    from torch import nn

    from accelkit.files.weights import check_model
    from accelkit.subject import Subject

    Subject.of(pipe).backbone.restore()
    in_folders = folder is not None and (folder / "model_index.json").is_file()
    for part, module in pipe.components.items():
        if isinstance(module, nn.Module):
            place = folder / part if folder and in_folders else folder
            check_model(module, f"the {part} of {name}", place)
    pipe.set_progress_bar_config(disable=True)
    return pipe
