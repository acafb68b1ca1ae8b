"""What a retrofit leaves behind: tuned weights, the schedule they were tuned for, a model card."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from accelkit.artifact.adapter import Adapter, refuse_peft
from accelkit.artifact.loading import (
    FETCH_AGAIN,
    is_alone,
    open_pipeline,
    reading,
    refuse_original_settings,
    refuse_revision,
)
from accelkit.assets import BUILTIN, builtin
from accelkit.backbones import backbone_of, denoiser_of
from accelkit.cost import ideal_saving
from accelkit.errors import AccelkitError
from accelkit.files.documents import check_regular
from accelkit.files.tensors import load_tensors, recorded_sum, write_tensors
from accelkit.files.weights import check_weights
from accelkit.files.writing import read_record, write_bytes, write_record
from accelkit.runtime.switch import Enabled, enable, enabled_on
from accelkit.schedule import Schedule

CONFIG, WEIGHTS, CARD = "accelkit.json", "accelkit.safetensors", "README.md"
FORMAT = 1


def save(
    pipe: Any,
    directory: str | Path,
    *,
    base_model: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    vae: str | None = None,
    num_heads: int | None = None,
    training: dict[str, Any] | None = None,
    metrics: dict[str, Any] | None = None,
    adapter: Adapter | None = None,
) -> Path:
    """Write the denoiser's weights, its schedule and where both come from.

    Args:
        pipe: a pipeline with a schedule in force.
        directory: where ``accelkit.safetensors``, ``accelkit.json`` and ``README.md`` go; made if
            missing, files of these names are replaced.
        base_model: what the rest of the pipeline is loaded from: ``builtin``, a directory or hub
            id. Default: where ``pipe`` was loaded from.
        revision: of the base model.
        variant: of the base model's weights.
        vae: directory or hub id of the autoencoder of a base model in the original layout.
        num_heads: attention heads of such a model of unpublished size.
        training: settings worth keeping, plain data.
        metrics: results worth keeping, plain data.
        adapter: what was added to the base model's weights, and is in those of ``pipe``; kept in
            place of all weights.

    Returns:
        The directory.

    Raises:
        AccelkitError: no schedule is in force, the base model is not known, the denoiser carries
            PEFT adapters, or ``vae`` or ``num_heads`` is given for a base model that is not in the
            original layout.
    """
    state = enabled_on(pipe)
    if state is None:
        raise AccelkitError("this pipeline runs no schedule; accelkit.enable one, then save")
    base = base_model or getattr(pipe, "name_or_path", None) or pipe.config.get("_name_or_path")
    if not base:
        raise AccelkitError(
            "this pipeline was not loaded from anywhere; say with base_model= what "
            "accelkit.from_pretrained should load it from"
        )
    base = BUILTIN if Path(base) == builtin() else _findable(base)
    if not is_alone(base):
        refuse_original_settings(base, vae, num_heads)
    model = state.backbone.model
    refuse_peft(model)
    directory = Path(directory)
    weights = model.state_dict() if adapter is None else adapter.tensors
    write_tensors(directory / WEIGHTS, {k: v.detach().cpu().clone() for k, v in weights.items()})
    from accelkit.version import __version__

    config = {
        "format": FORMAT,
        "accelkit": __version__,
        "family": state.backbone.family,
        "schedule": state.schedule.to_dict(),
        "base_model_name_or_path": base,
        "revision": revision,
        **({} if variant is None else {"variant": variant}),
        **({} if adapter is None else {"lora": adapter.about(model)}),
        "vae": vae and _findable(vae),
        "num_heads": num_heads,
        "weights": recorded_sum(directory / WEIGHTS),
        "training": training or {},
        "metrics": metrics or {},
    }
    write_record(directory / CONFIG, config)
    saving = ideal_saving(model, state.schedule)
    card = _card(config, directory, state.schedule, saving, _call(pipe))
    write_bytes(directory / CARD, card.encode(errors="backslashreplace"))
    return directory


def _findable(name: str | Path) -> str:
    """Make a local path absolute, so that it is found from any working directory."""
    local = str(name) != BUILTIN and Path(name).exists()
    return str(Path(name).resolve()) if local else str(name)


def load(pipe: Any, source: str | Path, *, revision: str | None = None) -> Enabled:
    """Give ``pipe`` the tuned weights and the schedule of an artifact.

    Disabling the schedule later leaves the tuned weights in place.

    Args:
        pipe: a pipeline of the artifact's base model, without a schedule. Adapters of PEFT's are
            loaded after this.
        source: a directory that :func:`save` wrote, or a hub id.
        revision: of a hub id.

    Returns:
        The handle that :func:`accelkit.enable` gives.

    Raises:
        AccelkitError: nothing is there, it is broken or damaged, its weights are not finite, it
            was made for another model or, if an adapter, for other weights, or ``pipe`` carries
            PEFT adapters; ``pipe`` is then as it was.
    """
    folder, config = _fetch(source, revision)
    model = denoiser_of(pipe)
    if enabled_on(model) is not None:
        raise AccelkitError("this pipeline runs a schedule already; call accelkit.disable first")
    backbone = backbone_of(model)
    schedule = Schedule.from_dict(config["schedule"])
    if (config["family"], schedule.layers) != (backbone.family, backbone.depth):
        raise AccelkitError(
            f"{source} was made for a {config['family']} of {schedule.layers} blocks, this is a "
            f"{backbone.family} of {backbone.depth}"
        )
    with reading(str(source)):
        check_regular(folder / WEIGHTS)
        weights = load_tensors(folder / WEIGHTS, FETCH_AGAIN)
        _refuse_mixture(folder, config)
    own = model.state_dict()
    floating = {k: w for k, w in weights.items() if k not in own or own[k].is_floating_point()}
    check_weights(floating, str(folder / WEIGHTS))
    refuse_peft(model)
    if (found := config.get("lora")) is not None:
        adapter = Adapter(found["rank"], weights)
        adapter.check(model)
        adapter.check_base(model, found["probes"])
        state = enable(pipe, schedule)
        adapter.apply(model)
        return state
    strange = set(weights.keys() ^ own.keys())
    strange |= {k for k in weights.keys() & own.keys() if weights[k].shape != own[k].shape}
    if strange:
        raise AccelkitError(
            f"the weights in {source} do not fit this model: {len(strange)} keys differ, e.g. "
            f"{', '.join(sorted(strange)[:3])}"
        )
    state = enable(pipe, schedule)  # first, for it may refuse
    model.load_state_dict(weights)
    return state


def from_pretrained(
    source: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    vae: str | None = None,
    num_heads: int | None = None,
) -> Any:
    """Return a ready pipeline: base model, tuned weights and schedule in force.

    Args:
        source: an artifact's directory or hub id. A plain pipeline (``builtin``, a directory, an
            original-layout file, a hub id) is returned as it is, without a schedule, with the
            original DiT's numerics restored where its config records them.
        revision: of a hub id.
        variant: of a pipeline's weights, such as ``fp16``, or of an artifact's base model's.
        vae: directory or hub id of the autoencoder that goes with an original-layout file.
        num_heads: attention heads of an original-layout file of unpublished size.

    Raises:
        AccelkitError: as :func:`load`, the base model cannot be read, or ``vae`` or ``num_heads``
            is given for what is no original-layout file.
    """
    config = config_of(source, revision)
    if config is None:
        return open_pipeline(
            source, revision=revision, variant=variant, vae=vae, num_heads=num_heads
        )
    refuse_original_settings(str(source), vae, num_heads)
    base = base_of(config)
    pipe = open_pipeline(**base | {"variant": variant or base["variant"]})
    load(pipe, source, revision=revision)
    return pipe


def config_of(source: str | Path, revision: str | None = None) -> dict[str, Any] | None:
    """Return the ``accelkit.json`` of an artifact, None if ``source`` is no artifact.

    Raises:
        AccelkitError: it is one, but broken or of another format.
    """
    return _fetch(source, revision)[1] if _is_artifact(source, revision) else None


def base_of(config: dict[str, Any]) -> dict[str, Any]:
    """Return what an artifact's base model is opened by, as :func:`open_pipeline` takes it."""
    rest = {name: config.get(name) for name in ("revision", "variant", "vae", "num_heads")}
    return {"model": config["base_model_name_or_path"], **rest}


def _is_artifact(source: str | Path, revision: str | None) -> bool:
    path = Path(source)
    if path.exists() or str(source) == BUILTIN:
        return (path / CONFIG).is_file() and str(source) != BUILTIN
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(str(source), CONFIG, revision=revision)  # offline: from the hub's cache
    except Exception:  # no hub id, or no way to the hub: opening it as a pipeline says which
        return False
    return True


def _fetch(source: str | Path, revision: str | None) -> tuple[Path, dict[str, Any]]:
    folder = Path(source)
    if folder.is_dir():
        refuse_revision(str(source), revision)
    else:
        with reading(str(source)):
            from huggingface_hub import snapshot_download

            folder = Path(
                snapshot_download(
                    str(source), revision=revision, allow_patterns=[CONFIG, WEIGHTS, CARD]
                )
            )
    if not (folder / CONFIG).is_file():
        raise AccelkitError(f"{source} is no accelkit artifact: it has no {CONFIG}")
    config = read_record(folder / CONFIG, FETCH_AGAIN)
    known = isinstance(config, dict) and config.get("format") == FORMAT and "schedule" in config
    known = known and all(isinstance(config.get(n), kinds) for n, kinds in _FORM.items())
    lora = known and config.get("lora", {"rank": 0, "probes": []})  # none: whole weights
    if not (isinstance(lora, dict) and {"rank", "probes"} <= lora.keys()):
        raise AccelkitError(
            f"{folder / CONFIG} is not of format {FORMAT}, which this version of accelkit reads"
        )
    try:
        Schedule.from_dict(config["schedule"])
    except AccelkitError as error:
        raise AccelkitError(f"cannot read the schedule in {folder / CONFIG}: {error}") from error
    return folder, config


def _refuse_mixture(folder: Path, config: dict[str, Any]) -> None:
    """Raise AccelkitError for weights and settings of two saves, the second of which was killed."""
    recorded, found = config.get("weights"), recorded_sum(folder / WEIGHTS)
    # weights that another program has written again have no checksum, earlier settings record none
    if recorded and found and recorded != found:
        raise AccelkitError(
            f"{CONFIG} and {WEIGHTS} in {folder} were not saved together; save the artifact again, "
            "or go on with the run that saves it"
        )


_FORM: dict[str, Any] = {
    "family": str,
    "base_model_name_or_path": str,
    "revision": str | None,
    "vae": str | None,
    "num_heads": int | None,
}
"""Settings of ``accelkit.json`` that are read again, each with its type."""


def _call(pipe: Any) -> str:
    """How a pipeline makes images, as far as a card can know."""
    takes = inspect.signature(type(pipe).__call__).parameters
    if "num_frames" in takes:  # trained on images, videos of one frame
        return 'pipe("a red bird", num_frames=1).frames'
    backbone = backbone_of(denoiser_of(pipe))
    labels = f"class_labels={list(range(min(3, backbone.num_classes or 3)))}"
    if "guidance_scale" in takes and backbone.null_class is None:
        labels += ", guidance_scale=1"
    ways = {"prompt": '"a red bird"', "class_labels": labels}
    return f"pipe({next((way for name, way in ways.items() if name in takes), '')}).images"


def _card(
    config: dict[str, Any], directory: Path, schedule: Schedule, saving: float, call: str
) -> str:
    name = directory.resolve().name  # nothing of where this machine keeps it, if that was given
    place = name if directory.is_absolute() or not directory.name else directory.as_posix()
    base = config["base_model_name_or_path"]
    task = "text-to-image" if '"' in call else "unconditional-image-generation"
    header = ["library_name: accelkit", f"pipeline_tag: {task}"]
    if "/" in base and not Path(base).exists():
        header.append(f"base_model: {base}")
    bounds = zip((0.0, *schedule.edges), schedule.edges, schedule.computes, strict=False)
    rows = [f"| {a:g} – {b:g} | {c.depth} of {schedule.layers} |" for a, b, c in bounds]
    sections = [
        "---\n" + "\n".join([*header, "tags: [diffusion, early-exit, accelkit]"]) + "\n---",
        f"# {name}: {schedule.name or 'a schedule'} on {base}",
        "Made with accelkit: the number of transformer blocks that run follows the noise level, "
        "and the weights were fine-tuned for it.",
        "| noise level | blocks run |\n|---|---|\n" + "\n".join(rows),
        f"Mean depth {schedule.mean_depth():.2f}, ideal saving {saving:.1%}.",
        f'```python\nimport accelkit\n\npipe = accelkit.from_pretrained("{place}")\n'
        f"images = {call}\n```",
    ]
    for title in ("metrics", "training"):
        if config[title]:
            body = json.dumps(config[title], indent=2)
            sections.append(f"## {title.capitalize()}\n\n```json\n{body}\n```")
    return "\n\n".join(sections) + "\n"
