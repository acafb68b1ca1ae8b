"""What the name of a model stands for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from accelkit.assets import BUILTIN, builtin
from accelkit.errors import AccelkitError
from accelkit.files.documents import is_utf8, read_object
from accelkit.files.writing import read_record
from accelkit.schedule import Schedule

CONFIG, WEIGHTS, CARD = "accelkit.json", "accelkit.safetensors", "README.md"
FORMAT = 1
FETCH_AGAIN = "download, copy or save it again"
"""What to do about a damaged file of weights."""
ORIGINAL_SUFFIXES = {".pt", ".pth", ".ckpt", ".safetensors"}
"""Suffixes of checkpoints in the original layout."""
ALONE = ("DiTTransformer2DModel", "UViTTransformer2DModel")
"""Networks that accelkit can put into a pipeline."""


@dataclass(frozen=True)
class Named:
    """What a name stands for.

    Attributes:
        name: the name as it was given.
        kind: ``pipeline`` (a directory, or the built-in model), ``network`` (the directory of a
            network alone), ``file`` (a network alone in the original layout), ``artifact``, or
            ``hub`` for a name that nothing on this machine has.
        path: the directory or file, None for ``hub``.
        revision: the branch, tag or commit of a hub id.
        config: the content of an artifact's ``accelkit.json``.
    """

    name: str
    kind: Literal["pipeline", "network", "file", "artifact", "hub"]
    path: Path | None = None
    revision: str | None = None
    config: dict[str, Any] | None = None

    @property
    def alone(self) -> bool:
        """Whether it is a network without a pipeline."""
        return self.kind in ("network", "file")

    @property
    def base(self) -> dict[str, Any]:
        """The arguments of ``open_pipeline`` for an artifact's base model; {} for anything else."""
        if self.config is None:
            return {}
        rest = {name: self.config.get(name) for name in ("revision", "variant", "vae", "num_heads")}
        return {"model": self.config["base_model_name_or_path"], **rest}

    @property
    def place(self) -> str:
        """The directory or hub id of a pipeline.

        Raises:
            AccelkitError: the directory holds no pipeline, or the name cannot be a hub id.
        """
        if self.path is not None and self.path.is_dir():
            if not (self.path / "model_index.json").is_file():
                network = (self.path / "config.json").is_file()
                raise AccelkitError(
                    f"{self.path} is no pipeline directory: it has no model_index.json"
                    + (" (a network alone: put it into a pipeline)" if network else "")
                )
            return str(self.path)
        if not _may_be_hub_id(self.name):
            raise AccelkitError(
                f"no model at {self.name}; give {BUILTIN!r}, a pipeline's directory, an "
                "original-layout file or a hub id such as facebook/DiT-XL-2-256"
            )
        return self.name


def named(name: str | Path, revision: str | None = None) -> Named:
    """Return what a name stands for; the hub is asked about names that this machine does not have.

    Raises:
        AccelkitError: an artifact is broken or has another format, or a revision is given for a
            model on this machine.
    """
    found = named_base(name, revision)
    is_artifact = (found.path / CONFIG).is_file() if found.path else _on_the_hub(found)
    return artifact_of(found) if is_artifact else found


def named_base(name: str | Path, revision: str | None = None) -> Named:
    """Return what a name stands for if it is no artifact; the hub is not asked."""
    text, path = str(name), Path(name)
    if revision is not None and (text == BUILTIN or path.exists()):
        raise AccelkitError(f"{text} has no revisions; leave --revision out, which is of a hub id")
    if text == BUILTIN:
        return Named(text, "pipeline", builtin())
    if not path.is_dir():
        if path.suffix in ORIGINAL_SUFFIXES or path.is_file():
            return Named(text, "file", path)
        return Named(text, "hub", revision=revision)
    alone = (path / "config.json").is_file() and not (path / "model_index.json").is_file()
    alone = alone and read_object(path / "config.json").get("_class_name") in ALONE
    return Named(text, "network" if alone else "pipeline", path)


def artifact_of(found: Named) -> Named:
    """Return ``found`` as an artifact, downloaded if it is on the hub.

    Raises:
        AccelkitError: it is no artifact, is broken or has another format.
    """
    folder = found.path
    if folder is None or not folder.is_dir():
        with reading(found.name):
            from huggingface_hub import snapshot_download

            files = [CONFIG, WEIGHTS, CARD]
            folder = Path(
                snapshot_download(found.name, revision=found.revision, allow_patterns=files)
            )
    if not (folder / CONFIG).is_file():
        raise AccelkitError(f"{found.name} is no accelkit artifact: it has no {CONFIG}")
    return replace(found, kind="artifact", path=folder, config=_config(folder / CONFIG))


def refuse_original_settings(name: str, vae: str | None, num_heads: int | None) -> None:
    """Raise AccelkitError if either setting is given for ``name``, which has its own."""
    given = {"an autoencoder": vae, "a number of heads": num_heads}
    if words := " and ".join(word for word, value in given.items() if value is not None):
        raise AccelkitError(
            f"{name} has its own settings; leave {words} out, which go with an original-layout "
            f"checkpoint ({', '.join(sorted(ORIGINAL_SUFFIXES))})"
        )


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Raise AccelkitError, in one line, for a library's error over a missing or broken model."""
    try:
        yield
    except AccelkitError:
        raise
    except Exception as error:  # each library has errors of its own
        if not is_utf8(name):
            raise AccelkitError(
                f"cannot read the model {name}: its path is not UTF-8, and safetensors opens no "
                "other; rename it"
            ) from error
        where = "" if Path(name).exists() or name == BUILTIN else " here or from the hub"
        kind = type(error).__name__
        said = str(error).strip().partition("\n")[0].strip() or kind
        raise AccelkitError(f"cannot read the model {name}{where}: {kind}: {said}") from error


def _may_be_hub_id(name: str) -> bool:
    local = Path(name).is_absolute() or name.startswith((".", "~"))
    return not local and name.count("/") == 1


def _on_the_hub(found: Named) -> bool:
    if not _may_be_hub_id(found.name):
        return False
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(found.name, CONFIG, revision=found.revision)  # offline: from the cache
    except Exception:  # no hub id, or no connection: opening it as a pipeline says which
        return False
    return True


_FORM: dict[str, Any] = {
    "family": str,
    "base_model_name_or_path": str,
    "revision": str | None,
    "vae": str | None,
    "num_heads": int | None,
}
"""Types of the settings that are read from ``accelkit.json``."""


def _config(path: Path) -> dict[str, Any]:
    """Return the settings in an artifact's ``accelkit.json``, checked."""
    config = read_record(path, FETCH_AGAIN)
    known = isinstance(config, dict) and config.get("format") == FORMAT and "schedule" in config
    known = known and all(isinstance(config.get(n), kinds) for n, kinds in _FORM.items())
    lora = known and config.get("lora", {"rank": 0, "probes": []})  # absent with whole weights
    if not (isinstance(lora, dict) and {"rank", "probes"} <= lora.keys()):
        raise AccelkitError(
            f"{path} is not of format {FORMAT}, which this version of accelkit reads"
        )
    try:
        Schedule.from_dict(config["schedule"])
    except AccelkitError as error:
        raise AccelkitError(f"cannot read the schedule in {path}: {error}") from error
    return config
