"""The cases of benchmarks/kernels.py, and its error without a GPU."""

import json
import sys
from pathlib import Path

import pytest
import torch
from common import on_cuda

import accelkit_kernels


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    return pytest.importorskip("benchmarks.kernels")


def test_every_operation_is_measured_on_inputs_that_fit(script):
    cases = script.cases(1, torch.float32, "cpu")
    assert {f"{name}_reference" for name in cases} == {
        name for name in accelkit_kernels.__all__ if name.endswith("_reference")
    }
    for name, case in cases.items():
        actual, expected = case.operation(*case.inputs), case.reference(*case.inputs)
        torch.testing.assert_close(actual, expected, msg=lambda m, n=name: f"{n}: {m}")
        if case.backward:
            assert len(script.training(case.operation, case)()) == case.leaves


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kernels"])
    with pytest.raises(SystemExit) as left:
        script.main()
    assert left.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        "benchmarks.kernels needs a CUDA device, and none was found"
    ]


@on_cuda
def test_on_a_gpu(script, monkeypatch, tmp_path):
    path = tmp_path / "results.json"
    arguments = ["kernels", "--batch", "2", "--rounds", "2", "-o", str(path)]
    monkeypatch.setattr(sys, "argv", arguments)
    script.main()
    results = json.loads(path.read_text())["results"]
    assert set(script.cases(1, torch.float32, "cpu")) <= set(results)
