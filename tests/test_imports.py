"""Which room may import which: one way, from the floors that CONTRIBUTING.md lists."""

import ast
import os
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import accelkit

PACKAGE = Path(accelkit.__file__).parent
ROOT = PACKAGE.parent
KERNELS = ROOT / "kernels" / "accelkit_kernels"
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
FLOORS = re.search(r"```floors\n(.+?)```", CONTRIBUTING, re.DOTALL)[1].strip().splitlines()
FLOOR = {room: number for number, line in enumerate(FLOORS) for room in line.split()}
PUBLIC = {"AccelkitError": "accelkit.errors", "AccelkitWarning": "accelkit.errors"}
PUBLIC |= {
    "Compute": "accelkit.compute",
    "Merge": "accelkit.compute",
    "Schedule": "accelkit.schedule",
    **accelkit._LAZY,
}
TERMINAL = {"typer", "click", "rich"}


def files(folder):
    return sorted(folder.rglob("*.py"))


def dotted(path):
    """A file's name as it is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {dotted(path): path for path in files(PACKAGE) if path != PACKAGE / "__init__.py"}


def imported(path):
    """Every absolute dotted name a file imports at run time; relative ones are refused."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        node
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and getattr(test.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(test)
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def of_accelkit(path):
    """The files of accelkit that a file imports; a public name stands for where it is made."""
    for name in imported(path):
        package, _, rest = name.partition(".")
        if package != "accelkit" or not rest:
            continue
        if rest in PUBLIC and name not in NAMES:
            name = PUBLIC[rest]
        found = name if name in NAMES else name.rpartition(".")[0]
        assert found in NAMES, f"{path} imports {name}"
        yield found


def room(name):
    return name.split(".")[1]


def test_the_floors_hold_every_room_once():
    assert len(FLOOR) == sum(len(line.split()) for line in FLOORS)
    assert set(FLOOR) == {room(name) for name in NAMES}
    assert len(FLOOR) <= 28
    assert len(FLOORS) <= 11


@pytest.mark.parametrize("name", NAMES)
def test_imports_go_down(name):
    own = room(name)
    others = {room(other) for other in of_accelkit(NAMES[name])} - {own}
    assert {other: FLOOR[other] for other in others if FLOOR[other] >= FLOOR[own]} == {}


def test_no_circle_of_files():
    uses = {name: set(of_accelkit(path)) - {name} for name, path in NAMES.items()}
    try:
        TopologicalSorter(uses).prepare()
    except CycleError as error:
        pytest.fail(f"these files import each other: {error.args[1]}")


@pytest.mark.parametrize("path", files(KERNELS), ids=lambda path: path.name)
def test_kernels_know_nothing_of_accelkit(path):
    assert not [name for name in imported(path) if name.split(".")[0] == "accelkit"]


def test_the_terminal_is_left_to_the_command_line():
    users = {
        room(name)
        for name, path in NAMES.items()
        if TERMINAL & {used.split(".")[0] for used in imported(path)}
    }
    assert users <= {"cli"}


def run(code, cwd):
    path = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_accelkit_loads_nothing_heavy(tmp_path):
    code = "import sys, accelkit; accelkit.Schedule.parse('D4'); print(*sys.modules)"
    loaded = {name.split(".")[0] for name in run(code, tmp_path).split()}
    assert "accelkit" in loaded
    assert not loaded & {"torch", "triton", "diffusers", "transformers", "numpy", *TERMINAL}


def test_kernels_is_no_package():
    # diffusers asks for a package called kernels, and would be handed ours from here
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s and s.origin)"
    origin = run(code, ROOT)
    assert origin == "None" or ROOT not in Path(origin).parents
