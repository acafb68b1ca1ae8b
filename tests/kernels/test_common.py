"""The reference runs with one warning where a kernel cannot."""

import warnings

import pytest
import torch
from torch import Tensor

from accelkit_kernels import _common


@pytest.fixture(autouse=True)
def _forgetful(monkeypatch):
    monkeypatch.setattr(_common, "_warned", set())
    monkeypatch.setattr(_common, "_failed", set())


def test_a_kernel_that_fails_is_given_up_with_one_warning(monkeypatch):
    monkeypatch.setattr(_common, "kernel_serves", lambda *_: True)
    monkeypatch.setattr(_common, "INTERPRETED", False)
    tries = []

    def kernel(x: Tensor) -> Tensor:
        tries.append(x)
        raise RuntimeError("ptxas is not there\nand more")

    x = torch.ones(3)
    with pytest.warns(
        RuntimeWarning, match=r"PyTorch reference: .*RuntimeError: ptxas is not there"
    ):
        assert torch.equal(_common.run("some_operation", kernel, torch.neg, x), -x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(_common.run("some_operation", kernel, torch.neg, x), -x)
        assert len(tries) == 1
        # Another width is another compilation, which may succeed; its failure is not news.
        assert torch.equal(_common.run("some_operation", kernel, torch.neg, x[1:]), -x[1:])
        assert len(tries) == 2


@pytest.mark.parametrize(
    ("interpreted", "error"), [(True, ValueError), (False, torch.OutOfMemoryError)]
)
def test_what_is_not_the_compilers_fault_is_raised(monkeypatch, interpreted, error):
    monkeypatch.setattr(_common, "kernel_serves", lambda *_: True)
    monkeypatch.setattr(_common, "INTERPRETED", interpreted)

    def kernel(x: Tensor) -> Tensor:
        raise error("no")

    with pytest.raises(error, match="no"):
        _common.run("some_operation", kernel, torch.neg, torch.ones(3))


class OnOldGPU:
    """The attributes of a tensor that decide whether a kernel runs."""

    is_cuda, dtype, device = True, torch.bfloat16, torch.device("cuda:0")

    def numel(self) -> int:
        return 1


@pytest.mark.parametrize(
    ("triton", "capability", "says"),
    [(True, (7, 5), "compute capability 8.0"), (False, (9, 0), "Triton is not installed")],
)
def test_a_gpu_without_its_kernel(monkeypatch, triton, capability, says):
    monkeypatch.setattr(_common, "HAS_TRITON", triton)
    monkeypatch.setattr(_common, "TRITON_PROBLEM", None if triton else "Triton is not installed")
    monkeypatch.setattr(_common, "_capability", lambda device: capability)
    with pytest.warns(RuntimeWarning, match=says):
        assert not _common.kernel_serves(OnOldGPU(), None, "some_operation")


def test_what_a_kernel_serves(monkeypatch):
    monkeypatch.setattr(_common, "HAS_TRITON", True)
    monkeypatch.setattr(_common, "INTERPRETED", True)
    assert _common.kernel_serves(torch.empty(1, 1, 64), 64)
    assert not _common.kernel_serves(torch.empty(1, 1, 65), 64)
    assert _common.kernel_serves(torch.empty(1, 1, 65))
    assert not _common.kernel_serves(torch.empty(2, 0, 64))
