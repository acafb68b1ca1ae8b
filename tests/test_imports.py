"""Which module may import which: one way, from the schedule to the command line."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import accelkit

PACKAGE = Path(accelkit.__file__).parent
ROOT = PACKAGE.parent
KERNELS = ROOT / "kernels" / "accelkit_kernels"

# Each may import what stands in its own tier or in one above.
TIERS = [
    {"errors"},
    {"documents", "sizes", "locks"},
    {"compute", "schedule", "noise", "processes", "files", "assets", "settings", "published"},
    {"tensors"},
    {"weights"},
    {"dvd"},
    {"presets"},
    {"recording"},
    {"backbones", "models"},
    {"routing", "hooking", "hooks", "compiling", "others", "merging"},
    {"fused"},
    {"switch"},
    {"taps", "cost", "adapter", "graphs"},
    {"artifact", "loading", "autoencoders"},
    {"data", "train", "sample"},
    {"metrics", "bench"},
    {"jobs", "progress"},
    {"cli", "__main__"},
]
RANK = {name: rank for rank, tier in enumerate(TIERS) for name in tier}
PUBLIC = {"AccelkitError": "accelkit.errors", "AccelkitWarning": "accelkit.errors"}
PUBLIC |= {
    "Compute": "accelkit.compute",
    "Merge": "accelkit.compute",
    "Schedule": "accelkit.schedule",
    **accelkit._LAZY,
}
TERMINAL = {"typer", "click", "rich"}


def modules(folder):
    return sorted(path for path in folder.rglob("*.py"))


def part(path):
    """The module or sub-package of accelkit that a file belongs to."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path):
    """Every absolute dotted name a file imports, wherever in it; relative ones are refused."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def accelkit_parts(path):
    """The parts of accelkit that a file imports; a name of the root stands for where it lives."""
    for name in imported(path):
        package, _, rest = name.partition(".")
        if package != "accelkit" or not rest:
            continue
        target = rest.split(".")[0]
        if target in PUBLIC and target not in RANK:
            target = PUBLIC[target].split(".")[1]
        if target != "__version__":
            yield target


def test_every_module_has_a_tier():
    found = {part(path) for path in modules(PACKAGE)} - {"__init__"}
    assert found == set(RANK)


@pytest.mark.parametrize("path", modules(PACKAGE), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    if path == PACKAGE / "__init__.py":
        return  # the public API: names of every tier, loaded at first use
    rank = RANK[part(path)]
    wrong = [name for name in accelkit_parts(path) if RANK.get(name, len(TIERS)) > rank]
    assert not wrong


@pytest.mark.parametrize("path", modules(KERNELS), ids=lambda path: path.name)
def test_kernels_know_nothing_of_accelkit(path):
    assert not [name for name in imported(path) if name.split(".")[0] == "accelkit"]


def test_the_terminal_is_left_to_two_modules():
    users = {
        part(path)
        for path in modules(PACKAGE)
        if TERMINAL & {name.split(".")[0] for name in imported(path)}
    }
    assert users <= {"cli", "progress"}


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
