"""A small part of what ``python -m benchmarks.reliability`` tries: no fault among it."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
COUNTS = {"kills": 3, "damaged": 2, "caches": 1, "hostile": 6, "commands": 6}


def test_nothing_is_silent_crashes_or_has_no_way_on(tmp_path):
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    options = [word for kind, count in COUNTS.items() for word in (f"--{kind}", str(count))]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.reliability", *options, "-o", str(tmp_path / "found")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found").read_text())["results"]
    assert {kind: part["trials"] for kind, part in found.items()} == COUNTS
    assert [fault for part in found.values() for fault in part["faults"]] == []
