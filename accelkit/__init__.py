"""accelkit makes pretrained diffusion models faster: compute follows the noise level.

    pipe = DiTPipeline.from_pretrained(...)
    accelkit.enable(pipe, "D4")

Importing it loads neither torch nor diffusers; what needs them is imported at first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from accelkit import presets  # noqa: F401 - makes the published schedules known by name
from accelkit.compute import Compute, Merge
from accelkit.errors import AccelkitError, AccelkitWarning
from accelkit.schedule import Schedule
from accelkit.version import __version__

if TYPE_CHECKING:
    from accelkit.artifact.artifact import from_pretrained, load, save
    from accelkit.assets import builtin
    from accelkit.backbones import Backbone, register_backbone
    from accelkit.layouts.original import load_original
    from accelkit.noise.axis import NoiseAxis
    from accelkit.runtime.graphs import compile
    from accelkit.runtime.switch import disable, enable

_LAZY = {
    "Backbone": "accelkit.backbones",
    "NoiseAxis": "accelkit.noise.axis",
    "builtin": "accelkit.assets",
    "compile": "accelkit.runtime.graphs",
    "disable": "accelkit.runtime.switch",
    "enable": "accelkit.runtime.switch",
    "from_pretrained": "accelkit.artifact.artifact",
    "load": "accelkit.artifact.artifact",
    "load_original": "accelkit.layouts.original",
    "register_backbone": "accelkit.backbones",
    "save": "accelkit.artifact.artifact",
}

__all__ = [
    "AccelkitError",
    "AccelkitWarning",
    "Backbone",
    "Compute",
    "Merge",
    "NoiseAxis",
    "Schedule",
    "__version__",
    "builtin",
    "compile",
    "disable",
    "enable",
    "from_pretrained",
    "load",
    "load_original",
    "register_backbone",
    "save",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'accelkit' has no attribute {name!r}")
