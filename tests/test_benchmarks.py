"""The scripts of benchmarks/ follow the code: each is read, and tells its options."""

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "benchmarks").glob("*.py"))
SCRIPTS = [path.stem for path in FILES if "def main" in path.read_text()]
PACKAGES = sorted(path.parent.name for path in (ROOT / "benchmarks").glob("*/__main__.py"))


@pytest.mark.parametrize("name", [*SCRIPTS, *(f"{name}.__main__" for name in PACKAGES)])
def test_a_script_tells_its_options(name, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    script = importlib.import_module(f"benchmarks.{name}")
    with pytest.raises(SystemExit) as left:
        script.main()
    assert left.value.code == 0
    assert "--output" in capsys.readouterr().out


def test_every_script_is_listed():
    text = (ROOT / "benchmarks" / "README.md").read_text()
    assert SCRIPTS
    assert not [name for name in SCRIPTS + PACKAGES if f"benchmarks.{name}`" not in text]
