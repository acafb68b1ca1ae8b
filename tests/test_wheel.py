"""The wheel: everything that is needed is in it, and it works away from the sources."""

import os
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

import accelkit

ROOT = Path(__file__).parents[1]


def pip(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # with the builder at hand nothing is fetched; else pip gets it, as for any source package
    isolation = ["--no-build-isolation"] if find_spec("hatchling") else []
    pip("wheel", "--quiet", "--no-deps", *isolation, "--wheel-dir", folder, ROOT)
    (path,) = folder.glob("*.whl")
    return path


def test_what_is_in_it(wheel):
    assert wheel.name == f"accelkit-{accelkit.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        sizes = {i.filename: i.file_size for i in archive.infolist()}
        metadata = archive.read(f"accelkit-{accelkit.__version__}.dist-info/METADATA").decode()
        entries = archive.read(f"accelkit-{accelkit.__version__}.dist-info/entry_points.txt")
    wanted = [
        path.relative_to(base).as_posix()
        for base in (ROOT, ROOT / "kernels")
        for package in ("accelkit", "accelkit_kernels")
        for path in (base / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]
    wanted += [f"accelkit/recipes/{p.name}" for p in (ROOT / "recipes" / "published").iterdir()]
    assert "accelkit_kernels/adaln.py" in wanted
    assert "accelkit/recipes/ase-table3.toml" in wanted
    assert "accelkit/assets/digit_features.safetensors" in wanted
    assert "accelkit/assets/digits-dit/transformer/diffusion_pytorch_model.safetensors" in wanted
    assert sorted(n for n in sizes if ".dist-info/" not in n) == sorted(wanted)
    model = sum(s for n, s in sizes.items() if n.startswith("accelkit/assets/digits-dit/"))
    assert 1_000_000 < model <= 10_000_000
    assert wheel.stat().st_size <= 12_000_000
    assert any(n.endswith("licenses/LICENSE") for n in sizes)
    assert "Requires-Python: >=3.11" in metadata
    assert "\nRequires-Dist: diffusers" in metadata
    assert b"accelkit = accelkit.cli:main" in entries


def test_it_works_away_from_the_sources(wheel, tmp_path):
    target = tmp_path / "installed"
    pip("install", "--quiet", "--no-deps", "--target", target, wheel)
    (tmp_path / "elsewhere").mkdir()
    how = {
        "cwd": tmp_path / "elsewhere",
        "env": {**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"},
        "capture_output": True,
        "text": True,
        "timeout": 120,
    }
    shown = subprocess.run([target / "bin" / "accelkit", "schedules"], **how)
    assert shown.returncode == 0, shown.stderr
    assert "D4" in shown.stdout
    code = (
        "import accelkit, accelkit_kernels, accelkit.metrics.extractors as f;"
        "f.open_extractor('digits');"
        "import accelkit.jobs.published as p; [p.publication(name).source for name in p.names()];"
        "print(accelkit.__file__, accelkit_kernels.__file__, accelkit.builtin(), sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code], **how)
    assert done.returncode == 0, done.stderr
    places = [Path(line) for line in done.stdout.splitlines()]
    assert len(places) == 3
    assert all(target in place.parents for place in places)
