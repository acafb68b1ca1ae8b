"""What comes with the package: the built-in pipeline and the digit features."""

from pathlib import Path

from accelkit.errors import AccelkitError

ASSETS = Path(__file__).parent
BUILTIN = "builtin"
"""The name by which the built-in model is asked for."""
FINETUNE_RECIPE = ASSETS / "finetune.toml"
"""Settings that suit the built-in model, where a command and its recipe give none."""


def builtin() -> Path:
    """Return the directory of the built-in pipeline, a ``DiTPipeline`` of handwritten digits.

    Plain diffusers loads it: ``DiTPipeline.from_pretrained(accelkit.builtin())``.

    Raises:
        AccelkitError: the package was installed without its assets.
    """
    path = ASSETS / "digits-dit"
    if not (path / "model_index.json").is_file():
        raise AccelkitError(f"the built-in model is missing at {path}; install accelkit again")
    return path
