"""Artifacts: tuned weights, the schedule they were tuned for, and a model card."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from accelkit.artifact.adapter import Adapter, refuse_peft
from accelkit.artifact.loading import open_pipeline
from accelkit.artifact.names import (
    CARD,
    CONFIG,
    FETCH_AGAIN,
    FORMAT,
    WEIGHTS,
    Named,
    artifact_of,
    named,
    named_base,
    reading,
    refuse_original_settings,
)
from accelkit.assets import BUILTIN, builtin
from accelkit.backbones import Backbone
from accelkit.cost import ideal_saving
from accelkit.errors import AccelkitError
from accelkit.files.documents import check_regular
from accelkit.files.tensors import load_tensors, recorded_sum, write_tensors
from accelkit.files.weights import check_weights
from accelkit.files.writing import write_bytes, write_record
from accelkit.runtime.switch import Enabled, enable, enabled_on
from accelkit.schedule import Schedule
from accelkit.subject import Subject
from accelkit.version import __version__


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
        pipe: a pipeline with a schedule in force, or its subject.
        directory: the directory for ``accelkit.safetensors``, ``accelkit.json`` and ``README.md``,
            made if missing; files of these names are replaced.
        base_model: the model that the rest of the pipeline is loaded from: ``builtin``, a directory
            or hub id. Default: where ``pipe`` was loaded from.
        revision: revision of the base model.
        variant: variant of the base model's weights.
        vae: directory or hub id of the autoencoder of a base model in the original layout.
        num_heads: attention heads of such a base model of unpublished size.
        training: settings to record, plain data.
        metrics: results to record, plain data.
        adapter: the adapter that the weights of ``pipe`` contain, saved in place of all weights.

    Returns:
        The directory.

    Raises:
        AccelkitError: no schedule is in force, the base model is not known, the denoiser carries
            PEFT adapters, or ``vae`` or ``num_heads`` is given for a base model that is not in the
            original layout.
    """
    subject = Subject.of(pipe)
    pipe, state = subject.pipe, enabled_on(subject)
    if state is None:
        raise AccelkitError("this pipeline runs no schedule; accelkit.enable one, then save")
    base = base_model or getattr(pipe, "name_or_path", None) or pipe.config.get("_name_or_path")
    if not base:
        raise AccelkitError(
            "this pipeline does not record where it was loaded from; give base_model=, the model "
            "that accelkit.from_pretrained is to load"
        )
    base = BUILTIN if Path(base) == builtin() else _findable(base)
    if not named_base(base).alone:
        refuse_original_settings(base, vae, num_heads)
    model = state.backbone.model
    refuse_peft(model)
    directory = Path(directory)
    weights = model.state_dict() if adapter is None else adapter.tensors
    write_tensors(directory / WEIGHTS, {k: v.detach().cpu().clone() for k, v in weights.items()})
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
    saving = ideal_saving(subject, state.schedule)
    call = _call(pipe, state.backbone)
    card = _card(config, directory, state.schedule, saving, call)
    write_bytes(directory / CARD, card.encode(errors="backslashreplace"))
    return directory


def _findable(name: str | Path) -> str:
    """Return a local path as an absolute one, which holds in any working directory."""
    local = str(name) != BUILTIN and Path(name).exists()
    return str(Path(name).resolve()) if local else str(name)


def load(pipe: Any, source: str | Path | Named, *, revision: str | None = None) -> Enabled:
    """Give ``pipe`` the tuned weights and the schedule of an artifact.

    The tuned weights stay when the schedule is disabled.

    Args:
        pipe: a pipeline of the artifact's base model, without a schedule, or its subject. Load
            adapters of PEFT afterwards.
        source: a directory that :func:`save` wrote, or a hub id.
        revision: revision of a hub id.

    Returns:
        The handle that :func:`accelkit.enable` returns.

    Raises:
        AccelkitError: the artifact is missing, broken or damaged, its weights are not finite, it
            was made for another model or, if it is an adapter, for other weights, or ``pipe``
            carries PEFT adapters. ``pipe`` is then unchanged.
    """
    found = source if isinstance(source, Named) else artifact_of(named_base(source, revision))
    source, folder, config = found.name, found.path, found.config
    assert folder is not None
    assert config is not None
    subject = Subject.of(pipe)
    model, backbone = subject.model, subject.backbone
    if enabled_on(subject) is not None:
        raise AccelkitError("this pipeline runs a schedule already; call accelkit.disable first")
    schedule = Schedule.from_dict(config["schedule"])
    if (config["family"], schedule.layers) != (backbone.family, backbone.depth):
        raise AccelkitError(
            f"{source} was made for a {config['family']} of {schedule.layers} blocks, this is a "
            f"{backbone.family} of {backbone.depth}"
        )
    with reading(source):
        check_regular(folder / WEIGHTS)
        weights = load_tensors(folder / WEIGHTS, FETCH_AGAIN)
        _refuse_mixture(folder, config)
    own = model.state_dict()
    floating = {k: w for k, w in weights.items() if k not in own or own[k].is_floating_point()}
    check_weights(floating, str(folder / WEIGHTS))
    refuse_peft(model)
    if (lora := config.get("lora")) is not None:
        adapter = Adapter(lora["rank"], weights)
        adapter.check(model)
        adapter.check_base(model, lora["probes"])
        state = enable(subject, schedule)
        adapter.apply(model)
        return state
    strange = set(weights.keys() ^ own.keys())
    strange |= {k for k in weights.keys() & own.keys() if weights[k].shape != own[k].shape}
    if strange:
        raise AccelkitError(
            f"the weights in {source} do not fit this model: {len(strange)} keys differ, e.g. "
            f"{', '.join(sorted(strange)[:3])}"
        )
    state = enable(subject, schedule)  # may raise, so before the weights change
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
            original-layout file, a hub id) is returned without a schedule, with the original DiT's
            numerics restored if its config records them.
        revision: revision of a hub id.
        variant: variant of the weights of a pipeline or of an artifact's base model, such as
            ``fp16``.
        vae: directory or hub id of the autoencoder of an original-layout file.
        num_heads: attention heads of an original-layout file of unpublished size.

    Raises:
        AccelkitError: as of :func:`load`, the base model cannot be read, or ``vae`` or
            ``num_heads`` is given for something other than an original-layout file.
    """
    return open_named(named(source, revision), variant, vae, num_heads).pipe


def open_named(
    found: Named, variant: str | None = None, vae: str | None = None, num_heads: int | None = None
) -> Subject:
    """Return the subject of a ready pipeline; the rest as :func:`from_pretrained`."""
    if found.config is None:
        return Subject.of(open_pipeline(found, variant=variant, vae=vae, num_heads=num_heads))
    refuse_original_settings(found.name, vae, num_heads)
    base = found.base
    subject = Subject.of(open_pipeline(**base | {"variant": variant or base["variant"]}))
    load(subject, found)
    return subject


def _refuse_mixture(folder: Path, config: dict[str, Any]) -> None:
    """Raise AccelkitError if weights and settings come from two saves, the second one killed."""
    recorded, found = config.get("weights"), recorded_sum(folder / WEIGHTS)
    # There is no checksum in weights rewritten by another program, nor in older settings.
    if recorded and found and recorded != found:
        raise AccelkitError(
            f"{CONFIG} and {WEIGHTS} in {folder} were not saved together; save the artifact again, "
            "or go on with the run that saves it"
        )


def _call(pipe: Any, backbone: Backbone) -> str:
    """Return the example call of a model card."""
    takes = inspect.signature(type(pipe).__call__).parameters
    if "num_frames" in takes:  # trained on images, which are videos of one frame
        return 'pipe("a red bird", num_frames=1).frames'
    labels = f"class_labels={list(range(min(3, backbone.num_classes or 3)))}"
    if "guidance_scale" in takes and backbone.null_class is None:
        labels += ", guidance_scale=1"
    ways = {"prompt": '"a red bird"', "class_labels": labels}
    return f"pipe({next((way for name, way in ways.items() if name in takes), '')}).images"


def _card(
    config: dict[str, Any], directory: Path, schedule: Schedule, saving: float, call: str
) -> str:
    name = directory.resolve().name  # an absolute path would publish this machine's folders
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
