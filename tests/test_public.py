"""The public API: every name is there, says what it is, and is what it says."""

import inspect
from pathlib import Path

import pytest

import accelkit

NAMES = [name for name in accelkit.__all__ if name != "__version__"]


def members(value):
    """The public methods and properties that a class defines itself."""
    return {
        name: member
        for name, member in vars(value).items()
        if not name.startswith("_") and (callable(member) or isinstance(member, property))
    }


def test_all_is_complete_and_sorted():
    assert sorted(accelkit.__all__) == accelkit.__all__
    assert set(accelkit._LAZY) < set(accelkit.__all__)


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_documented_and_callable(name):
    value = getattr(accelkit, name)
    assert inspect.isfunction(value) or inspect.isclass(value)
    assert value.__name__ == name
    assert value.__doc__
    for title, member in members(value).items() if inspect.isclass(value) else ():
        assert inspect.getdoc(member), f"{name}.{title} has no docstring"


def test_version_and_unknown_names():
    assert accelkit.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="no attribute 'enabel'"):
        _ = accelkit.enabel


def test_no_module_has_a_public_names_name():
    # importing a sub-module sets it on its package, over the function of that name
    package = Path(accelkit.__file__).parent
    modules = {path.stem for path in package.iterdir() if path.suffix in {"", ".py"}}
    assert not modules & set(accelkit.__all__)
