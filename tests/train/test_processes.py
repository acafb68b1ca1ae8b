"""Two processes that train together.

Run as a script it is one of them.
"""

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
from accelkit.jobs.common import Run
from accelkit.jobs.training import claimed
from accelkit.train.rundir import RunDirectory

pytestmark = pytest.mark.usefixtures("one_cpu")


# Several processes

# Every step's gradient is clipped, so that its norm is of the whole batch or shows.
PAIR = replace(CONFIG, batch_size=4, steps=6, max_grad_norm=0.1)
SHARED = {
    "plain": PAIR,
    "accumulated": replace(PAIR, gradient_accumulation=2),
    "recomputed": replace(PAIR, gradient_checkpointing=True),
    "adapters": replace(PAIR, lora_rank=2),
    "supervised": replace(PAIR, intermediate_weight=1.0, intermediate_head="own"),
    "stopped": PAIR,
    "grown": PAIR,
}


def one_has_no_deep_sample(config, schedule=RAGGED):
    """Steps in which the deepest block is run by one of two processes only."""
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
    """Wait for processes; return what each ended with and wrote to stderr."""
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [(process.returncode, text) for process, text in zip(processes, errors, strict=True)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The folder in which two processes have trained what SHARED names."""
    folder = tmp_path_factory.mktemp("pair")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        with pytest.raises(Stopped, match="after step 3"):  # alone; the two go on with it
            fit(folder / "grown", PAIR, samples=signalled(signal.SIGTERM, at=2))
    for status, errors in ended(start(folder)):
        assert status == 0, errors
    return folder


@pytest.mark.parametrize("name", SHARED)
def test_two_processes_do_what_one_does(pair, tmp_path, name):
    assert one_has_no_deep_sample(SHARED[name]) >= 2
    one, other = build(), build()
    for rank, model in enumerate((one, other)):
        model.load_state_dict(torch.load(pair / f"{name}-{rank}.pt", weights_only=True))
    assert_same(one, other)
    plain = replace(SHARED[name], gradient_accumulation=1, gradient_checkpointing=False)
    assert_close(one, fit(tmp_path, plain))
    theirs, ours = (
        load_file(RunDirectory(run).latest()[1] / "model.safetensors")
        for run in (pair / name, tmp_path)
    )
    assert theirs.keys() == ours.keys()


@pytest.mark.parametrize("name", ["plain", "accumulated", "recomputed", "grown"])
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


def test_what_two_processes_began_one_can_finish(pair, tmp_path):
    shutil.copytree(pair / "stopped", tmp_path / "run")
    shutil.rmtree(RunDirectory(tmp_path / "run").latest()[1])
    assert latest(tmp_path / "run") == 3
    assert_close(fit(tmp_path / "run", PAIR), fit(tmp_path / "alone", PAIR))


def test_one_process_is_told_that_the_other_was_refused(pair):
    refused, told = ((pair / f"refused-{rank}.txt").read_text() for rank in (0, 1))
    assert "is not empty" in refused
    assert told.startswith("another of the 2 processes has ended, and this one cannot go on")


def test_one_process_is_told_that_the_other_was_killed(tmp_path):
    (status, _), (killed, _) = ended(start(tmp_path, DIES="1"))
    assert (status, killed) == (0, -signal.SIGKILL)
    told = (tmp_path / "killed.txt").read_text()
    assert told.startswith("another of the 2 processes has ended, and this one cannot go on")
    assert len(told) <= 400
    assert "\n" not in told


def shared(folder):
    """Train as one of two processes; in one run the second one gets a signal midway."""
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
        (folder / f"refused-{rank}.txt").write_text(str(error))
    os._exit(0)  # as the processes have parted already


def killed(folder):
    """Train until the second process is killed."""
    try:
        fit(folder / "run", PAIR, samples=signalled(signal.SIGKILL, at=int(os.environ["RANK"]) * 2))
    except AccelkitError as error:
        (folder / "killed.txt").write_text(str(error))
    os._exit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    (killed if "DIES" in os.environ else shared)(Path(sys.argv[1]))
