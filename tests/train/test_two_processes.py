"""Two processes that train together; run as a script, this is one of them."""

import json
import os
import shutil
import signal
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from by_hand import train_by_hand
from safetensors.torch import load_file
from toy_run import (
    CONFIG,
    LAYERS,
    RAGGED,
    assert_close,
    assert_same,
    build,
    depths,
    drawn,
    fit,
    latest,
    script,
    signalled,
    weights,
)

from accelkit.errors import AccelkitError, Stopped
from accelkit.jobs.settings import Run
from accelkit.jobs.training import claimed
from accelkit.train.rundir import RunDirectory

pytestmark = pytest.mark.usefixtures("one_cpu")


# Every step's gradient is clipped, so that a norm of less than the whole batch would show.
PAIR = replace(CONFIG, batch_size=4, steps=5, max_grad_norm=0.1)
SHARED = {
    "plain": PAIR,
    "saving memory": replace(PAIR, gradient_accumulation=2, gradient_checkpointing=True),
    "adapters": replace(PAIR, lora_rank=2),
    "supervised": replace(PAIR, intermediate_weight=1.0, intermediate_head="own"),
    "stopped": PAIR,
    "grown": PAIR,
}


def one_has_no_deep_sample(config, schedule=RAGGED):
    """Return the number of steps in which one of two processes runs the deepest block."""
    shares = [
        [LAYERS in depths(drawn(config, step).part(rank, 2).timestep) for rank in (0, 1)]
        for step in range(config.steps)
    ]
    return sum(one != other for one, other in shares)


def start(folder, **environment):
    """Start two processes of this script in ``folder``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **environment}
    return [script(__file__, folder, RANK=rank, LOCAL_RANK=rank, **shared) for rank in ("0", "1")]


def ended(processes):
    """Wait for processes; return the status and stderr of each."""
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [(process.returncode, text) for process, text in zip(processes, errors, strict=True)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The folder in which two processes have trained the runs of SHARED."""
    folder = tmp_path_factory.mktemp("pair")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        with pytest.raises(Stopped, match="after step 3"):  # alone; the two resume it
            fit(folder / "grown", PAIR, samples=signalled(signal.SIGTERM, at=2))
    (first, _), (second, errors) = ended(start(folder))
    assert (first, second) == (-signal.SIGKILL, 0), errors
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process's model, and the folder of its run."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        return fit(folder, PAIR), folder


@pytest.mark.parametrize("name", SHARED)
def test_two_processes_do_what_one_does(pair, alone, tmp_path, name):
    assert one_has_no_deep_sample(SHARED[name]) >= 2
    one, other = build(), build()
    for rank, model in enumerate((one, other)):
        model.load_state_dict(torch.load(pair / f"{name}-{rank}.pt", weights_only=True))
    assert_same(one, other)
    expected, folder = alone
    if name in ("adapters", "supervised"):
        expected, folder = fit(tmp_path, SHARED[name]), tmp_path
    assert_close(one, expected)
    theirs, ours = (
        load_file(RunDirectory(run).latest()[1] / "model.safetensors")
        for run in (pair / name, folder)
    )
    assert theirs.keys() == ours.keys()


@pytest.mark.parametrize("name", ["plain", "saving memory", "grown"])
def test_two_processes_report_what_a_loop_by_hand_does(pair, name):
    expected = train_by_hand(PAIR, RAGGED)
    begun = 3 if name == "grown" else 0
    seen = json.loads((pair / f"{name}.json").read_text())
    assert [step for step, *_ in seen] == list(range(begun + 1, PAIR.steps + 1))
    _, losses, norms, rates = zip(*seen, strict=True)
    assert min(norms) > PAIR.max_grad_norm
    assert losses == pytest.approx(expected.losses[begun:], rel=1e-5)
    assert norms == pytest.approx(expected.norms[begun:], rel=1e-4)
    assert rates == pytest.approx(expected.rates[begun + 1 :])


def test_a_signal_to_one_process_stops_both_at_the_same_step(pair):
    steps = [(pair / f"stopped-{rank}.txt").read_text() for rank in (0, 1)]
    assert steps == ["3", "3"]


def test_one_process_finishes_a_run_that_two_began(pair, alone, tmp_path):
    shutil.copytree(pair / "stopped", tmp_path / "run")
    shutil.rmtree(RunDirectory(tmp_path / "run").latest()[1])
    assert latest(tmp_path / "run") == 3
    assert_close(fit(tmp_path / "run", PAIR), alone[0])


@pytest.mark.parametrize("during", ["opening", "training"])
def test_a_process_reports_that_the_other_has_ended(pair, during):
    assert "is not empty" in (pair / "refused.txt").read_text()
    message = (pair / f"{during}.txt").read_text()
    assert message.startswith("another of the 2 processes has ended, and this one cannot continue")
    assert len(message) <= 400
    assert "\n" not in message


def shared(folder):
    """Train as one of two processes; in one run the second one gets a signal midway.

    In the end the first one is refused a directory and killed, while the second one goes on.
    """
    rank = os.environ["RANK"]
    for name, config in SHARED.items():
        if name == "stopped":
            try:
                fit(folder / name, config, samples=signalled(signal.SIGTERM, at=int(rank) * 2))
            except Stopped:
                torch.distributed.barrier()
                (folder / f"{name}-{rank}.txt").write_text(str(latest(folder / name)))
            torch.distributed.barrier()
        seen = []
        torch.save(
            weights(fit(folder / name, config, on_step=seen.append)), folder / f"{name}-{rank}.pt"
        )
        if rank == "0":
            rows = [(p.step, p.loss, p.grad_norm, p.learning_rate) for p in seen]
            (folder / f"{name}.json").write_text(json.dumps(rows))
    try:
        with claimed({}, PAIR, Run(folder / "plain")):
            pass
    except AccelkitError as error:
        (folder / ("refused.txt" if rank == "0" else "opening.txt")).write_text(str(error))
    if rank == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        fit(folder / "lost", PAIR)
    except AccelkitError as error:
        (folder / "training.txt").write_text(str(error))
    os._exit(0)  # there is no other process to leave the group with


if __name__ == "__main__":
    torch.set_num_threads(1)
    shared(Path(sys.argv[1]))
