"""Assets of the package: the built-in pipeline and the digit features."""

from pathlib import Path

from accelkit.errors import AccelkitError

ASSETS = Path(__file__).parent
BUILTIN = "builtin"
"""Name of the built-in model."""
FINETUNE_RECIPE = ASSETS / "finetune.toml"
"""Settings that suit the built-in model, used if neither the command nor its recipe gives them."""


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
