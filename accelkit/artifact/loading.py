"""Finds and opens the pipeline that a user names: built in, a directory, a file or on the hub."""

from __future__ import annotations

import os
import re
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelkit.assets import BUILTIN, builtin
from accelkit.errors import AccelkitError, AccelkitWarning
from accelkit.files.documents import is_utf8, read_object
from accelkit.files.tensors import check_tensors
from accelkit.models.sizes import check_configs
from accelkit.noise.axis import reference_process

FETCH_AGAIN = "download, copy or save it again"
"""What to do about a damaged file of weights."""
ORIGINAL_SUFFIXES = {".pt", ".pth", ".ckpt", ".safetensors"}
ORIGINAL_VAE = "stabilityai/sd-vae-ft-ema"
"""The autoencoder DiT was evaluated with (Peebles and Xie 2023, section 4)."""


def open_pipeline(
    model: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    vae: str | None = None,
    num_heads: int | None = None,
) -> Any:
    """Return the pipeline that ``model`` names, in float32 on the CPU.

    The bars of diffusers and transformers for the loading of components stay off from then on.

    Args:
        model: ``builtin``, a pipeline's directory, a DiT or U-ViT alone (an original-layout
            checkpoint, ``.pt``, ``.pth`` or ``.safetensors``, or the directory that ``accelkit
            convert`` makes of one) or a hub id. The original's numerics are restored where
            recorded.
        revision: of a hub id: branch, tag or commit.
        variant: of the weights, as in ``diffusion_pytorch_model.fp16.safetensors``; components that
            lack it are opened from their plain weights.
        vae: directory or hub id of the autoencoder that goes with a network alone.
        num_heads: attention heads of an original-layout checkpoint of unpublished size.

    Raises:
        AccelkitError: nothing is there, it is no pipeline, it cannot be read, its weights are of a
            variant that is not asked for, or ``vae`` or ``num_heads`` is given for what is no
            original-layout checkpoint; its weights are damaged, not finite or no floating point
            numbers.
    """
    name = str(model)
    refuse_revision(name, revision)
    if is_alone(model):
        return _around(Path(model), vae, num_heads, variant)
    refuse_original_settings(name, vae, num_heads)
    with reading(name):
        import diffusers.utils.logging
        import transformers.utils.logging

        for library in (diffusers, transformers):
            library.utils.logging.disable_progress_bar()
        pipe, folder = _diffusers_pipeline(located(name), revision, variant)
        return _ready(pipe, name, folder)


def is_original(model: str | Path) -> bool:
    """Return whether ``model`` is a file, or named as one, of the original layout."""
    path = Path(model)
    return str(model) != BUILTIN and (path.suffix in ORIGINAL_SUFFIXES or path.is_file())


def is_alone(model: str | Path) -> bool:
    """Return whether ``model`` is a network without a pipeline that accelkit can put it into."""
    path = Path(model)
    if str(model) == BUILTIN or not path.is_dir():
        return is_original(model)
    alone = (path / "config.json").is_file() and not (path / "model_index.json").is_file()
    return alone and read_object(path / "config.json").get("_class_name") in _PIPELINES


def open_network(path: Path, num_heads: int | None = None, variant: str | None = None) -> Any:
    """Return a DiT or U-ViT alone, as :func:`open_pipeline` takes it, in eval mode.

    Args:
        path: file or directory.
        num_heads: attention heads of an original-layout checkpoint of unpublished size.
        variant: of the weights in a directory.

    Raises:
        AccelkitError: it cannot be read, its weights are of a variant that is not asked for, or has
            its heads told by its config.
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


def refuse_revision(name: str, revision: str | None) -> None:
    """Raise AccelkitError if a revision is given for what is not on the hub."""
    if revision is not None and (name == BUILTIN or Path(name).exists()):
        raise AccelkitError(f"{name} has no revisions; leave --revision out, which is of a hub id")


def refuse_original_settings(name: str, vae: str | None, num_heads: int | None) -> None:
    """Raise AccelkitError if either is given for ``name``, which brings its own."""
    given = {"an autoencoder": vae, "a number of heads": num_heads}
    if words := " and ".join(word for word, value in given.items() if value is not None):
        raise AccelkitError(
            f"{name} has its own settings; leave {words} out, which go with an original-layout "
            f"checkpoint ({', '.join(sorted(ORIGINAL_SUFFIXES))})"
        )


def _diffusers_pipeline(place: str, revision: str | None, variant: str | None) -> tuple[Any, Path]:
    """Return a pipeline and the folder that it was read from."""
    import diffusers

    from accelkit import models

    load = diffusers.DiffusionPipeline
    folder = place
    if not Path(place).is_dir():
        folder = load.download(place, revision=revision, variant=variant)
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
    name = str(index.get("_class_name"))
    if name == "DiTPipeline" and "transformer" in given:
        load = models.dit_pipeline_for(given["transformer"], (index.get("vae") or [None])[-1])
    else:
        load = getattr(models, name, load)
    if isinstance(names := index.get("id2label"), dict):
        # JSON has text for keys only, of which diffusers warns, expecting numbers
        given["id2label"] = {int(label): name for label, name in names.items()}
    pipe = load.from_pretrained(folder, variant=variant, **given)
    pipe.register_to_config(_name_or_path=place)
    return pipe, Path(folder)


def open_whole(kind: Any, place: str | Path, *, variant: str | None = None, **options: Any) -> Any:
    """Return ``kind.from_pretrained(place, **options)``, a network of diffusers, in eval mode.

    Warns of weights that the network has no place for.

    Args:
        kind: the network's class.
        place: directory or hub id.
        variant: of the weights; the plain ones are opened where a directory lacks it.
        **options: of ``from_pretrained``.

    Raises:
        AccelkitError: the files lack some of its weights, which diffusers would leave random, or
            are of a variant that is not asked for.
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
    """Return the variants of the weights in a component's directory, "" for the plain ones."""
    if not folder.is_dir():
        return set()
    found = (_WEIGHTS.fullmatch(path.name) for path in folder.iterdir())
    return {match["variant"] or match["older"] or "" for match in found if match}


def _check_variant(folder: Path, variant: str | None) -> None:
    """Raise AccelkitError if a component's weights are all of variants, ``variant`` not among."""
    found = sorted(variants(folder))
    if not found or "" in found or variant in found:
        return
    raise AccelkitError(
        f"the weights in {folder} are of the variant {' and '.join(found)} only; give "
        f"variant={found[0]!r} (--variant {found[0]})"
    )


def located(name: str | Path, index: str = "model_index.json") -> str:
    """Return the directory that ``name`` means, or the hub id that it must be.

    Raises:
        AccelkitError: a directory without ``index``, or neither a directory nor of a hub id's form.
    """
    path = builtin() if str(name) == BUILTIN else Path(name)
    if path.is_dir():
        if not (path / index).is_file():
            alone = " (a network alone: put it into a pipeline)"
            raise AccelkitError(
                f"{path} is no pipeline directory: it has no {index}"
                + (alone if (path / "config.json").is_file() else "")
            )
        return str(path)
    text = str(name)
    looks_local = path.is_absolute() or text.startswith((".", "~")) or text.count("/") != 1
    if looks_local:
        raise AccelkitError(
            f"no model at {text}; give {BUILTIN!r}, a pipeline's directory, an original-layout "
            "file or a hub id such as facebook/DiT-XL-2-256"
        )
    return text


@contextmanager
def reading(name: str) -> Any:
    """Turn what a library raises over a missing or broken model into one line."""
    try:
        yield
    except AccelkitError:
        raise
    except Exception as error:  # each library beneath has its own family of errors
        if not is_utf8(name):
            raise AccelkitError(
                f"cannot read the model {name}: its path is not UTF-8, and safetensors opens no "
                "other; rename it"
            ) from error
        where = "" if Path(name).exists() or name == BUILTIN else " here or from the hub"
        raise AccelkitError(
            f"cannot read the model {name}{where}: {type(error).__name__}: {_first_line(error)}"
        ) from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _around(path: Path, vae: str | None, num_heads: int | None, variant: str | None) -> Any:
    from accelkit.backbones.autoencoders import channels_of

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
        if not hasattr(kind, "encode"):  # no autoencoder: its weights will not fit one
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


_PIPELINES = {
    "DiTTransformer2DModel": _dit_pipeline,
    "UViTTransformer2DModel": _uvit_pipeline,
}
"""What goes around a network alone, by its class."""


def _ready(pipe: Any, name: str, folder: Path | None) -> Any:
    """Check that a pipeline is one accelkit can drive, and quieten its progress bar."""
    from torch import nn

    from accelkit.backbones import backbone_of, denoiser_of
    from accelkit.files.weights import check_model

    backbone_of(denoiser_of(pipe)).restore()
    for part, module in pipe.components.items():
        if isinstance(module, nn.Module):
            check_model(module, f"the {part} of {name}", folder and _folder_of(part, folder))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _folder_of(part: str, folder: Path) -> Path:
    """Return where a component's files are, ``folder`` itself for a network alone."""
    return folder / part if (folder / "model_index.json").is_file() else folder


def quiet() -> None:
    """Silence the libraries' notices that say nothing about the task at hand.

    Has effect if it is called before they are imported.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
