"""Shares of a batch on one thread each: the same results, and no traces."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from accelkit.runtime.fused import threads
from accelkit.runtime.switch import enable

TOKENS, HIDDEN = 16, 128  # of the small DiT


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def seen(monkeypatch):
    """Record the threads that run parts of a pass, and the number of samples of each part."""
    found, real = [], threads.each

    def spied(run, parts, count):
        def noted(part):
            found.append((threading.current_thread().name, len(part["sample"])))
            return run(part)

        return real(noted, parts, count)

    monkeypatch.setattr(threads, "each", spied)
    return found


def batch(count):
    draw = torch.Generator().manual_seed(count)
    latents = torch.randn(count, 4, 8, 8, generator=draw)
    return latents, {"timestep": torch.full((count,), 500), "class_labels": torch.arange(count) % 7}


@torch.no_grad()
def output(model, count):
    latents, how = batch(count)
    return model(latents, **how).sample


@pytest.mark.parametrize("count", [128, 131, 301])
def test_shares_give_what_the_whole_gives(dit, two_threads, seen, count):
    with enable(dit, "6@0.5,3@1", kernels="off"):
        own = output(dit, count)
    with enable(dit, "6@0.5,3@1"):
        shared = output(dit, count)
    torch.testing.assert_close(shared, own, atol=2e-5, rtol=1e-5)
    assert {name.partition("_")[0] for name, _ in seen} == {"accelkit"}
    sizes = [size for _, size in seen]
    assert sum(sizes) == count
    assert max(sizes) - min(sizes) <= len(sizes)  # similar, so that no thread waits


def test_small_batches_are_not_split(dit, two_threads, seen):
    with enable(dit, "full"):
        output(dit, 32)
    assert seen == []


def test_one_thread_takes_all(dit, seen):
    with enable(dit, "full"):
        output(dit, 600)
    assert {name for name, _ in seen} == {"MainThread"}


def test_the_number_of_threads_stays(dit, two_threads):
    with enable(dit, "full"):
        output(dit, 128)
    assert torch.get_num_threads() == 2
    later = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [2]


def test_operators_of_a_share_take_one_thread(two_threads):
    def taken(_):
        torch.randn(300, 300) @ torch.randn(300, 300)
        return torch.get_num_threads()

    assert set(threads._pool(2).map(taken, range(8))) == {1}


@pytest.mark.parametrize("inference", [True, False])
def test_results_can_be_used_as_those_of_the_whole(dit, two_threads, seen, inference):
    latents, how = batch(128)
    with enable(dit, "full"), torch.inference_mode() if inference else torch.no_grad():
        result = dit(latents, **how).sample
    assert len(seen) == 2
    assert result.is_inference() == inference
    assert not result.requires_grad


def test_a_counter_of_operators_sees_all_of_them(dit, two_threads):
    with enable(dit, "full"):
        with FlopCounterMode(display=False) as few:
            output(dit, 1)
        with FlopCounterMode(display=False) as many:
            output(dit, 128)
    # the pairs of timestep and label are embedded once each, here 7 of them
    assert many.get_total_flops() > 100 * few.get_total_flops()


def test_errors_come_through(two_threads):
    def fails(part):
        raise ValueError(f"part {part}")

    with pytest.raises(ValueError, match="part 0"):
        threads.each(fails, range(2), 2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_starts_its_own_threads(two_threads):
    assert [int(t) for t in threads.each(torch.tensor, range(4), 2)] == [0, 1, 2, 3]
    child = os.fork()
    if child == 0:
        made = [int(t) for t in threads.each(torch.tensor, range(4), 2)]
        os._exit(0 if made == [0, 1, 2, 3] else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    ("samples", "size", "expected"),
    [
        (256, (16, 256), (128, 2)),
        (300, (16, 256), (75, 2)),
        (64, (16, 256), (32, 2)),
        (16, (16, 256), (16, 1)),
        (16, (256, 1536), (8, 2)),
        (3, (256, 1536), (3, 1)),
        (1, (256, 1536), (1, 1)),
    ],
)
def test_how_a_batch_is_shared(two_threads, samples, size, expected):
    assert threads.share(torch.empty(samples, 1), *size) == expected


@pytest.mark.parametrize("threads_there", [3, 16, 64])
@pytest.mark.parametrize("samples", [1, 2, 8, 20, 64, 100, 256, 1000])
def test_no_thread_is_idle(monkeypatch, threads_there, samples):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads_there)
    count, used = threads.share(torch.empty(samples, 1), 256, 1536)
    assert used in (1, threads_there)
    shares = -(-samples // count)
    assert used == 1 or shares / (used * -(-shares // used)) > 0.75


def test_later_threads_keep_their_number(two_threads):
    threads._pool(2).submit(int).result()
    threads._pool(3).submit(int).result()
    assert list(threads._pools) == [3]
    later = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [torch.get_num_threads()] == [2]


AT_THE_END = """
import atexit, sys, threading, time, torch
sys.path.insert(0, "tests")
from small_models import DiT
from accelkit.runtime.switch import enable
torch.set_num_threads(2)
model, call = DiT().make(), DiT().call(100)
call = {k: v[:1].repeat(600, *[1] * (v.ndim - 1)) for k, v in call.items()}
enable(model, "full")

@torch.no_grad()
def sample(times):
    for _ in range(times):
        result = model(**call).sample
    print("made", len(result), flush=True)
"""


def test_an_interpreter_that_ends_finishes_what_was_begun():
    end = (
        "sample(1); atexit.register(sample, 2); "
        "threading.Thread(target=sample, args=(10,)).start(); time.sleep(0.01)"
    )
    done = subprocess.run(
        [sys.executable, "-c", AT_THE_END + end], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["made 600"] * 3, done.stderr


def test_one_thread_runs_all_parts_if_no_other_can_start(dit, two_threads, monkeypatch):
    latents, how = batch(128)
    with enable(dit, "full"), torch.no_grad():
        expected = dit(latents, **how).sample
    monkeypatch.setattr(threads, "_pools", {})
    start, left = threading.Thread.start, [1]

    def scarce(self):
        if not left:
            raise RuntimeError("can't start new thread")
        left.pop()
        start(self)

    monkeypatch.setattr(threading.Thread, "start", scarce)
    with enable(dit, "full"), torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(dit(latents, **how).sample, expected)
    monkeypatch.undo()
    assert torch.get_num_threads() == 2
