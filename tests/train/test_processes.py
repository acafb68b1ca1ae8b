"""Two processes that train together.

Run as a script it is one of them.
"""

import os
import shutil
import signal
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_run import (
    CONFIG,
    LAYERS,
    RAGGED,
    Toy,
    assert_close,
    assert_same,
    build,
    depths,
    drawn,
    fit,
    latest,
    script,
    weights,
)

from accelkit.errors import Stopped
from accelkit.train.rundir import RunDirectory

pytestmark = pytest.mark.usefixtures("one_cpu")


# Several processes

PAIR = replace(CONFIG, batch_size=4, steps=6)
SHARED = {
    "plain": PAIR,
    "accumulated": replace(PAIR, gradient_accumulation=2),
    "recomputed": replace(PAIR, gradient_checkpointing=True),
    "adapters": replace(PAIR, lora_rank=2),
    "supervised": replace(PAIR, intermediate_weight=1.0, intermediate_head="own"),
    "stopped": PAIR,
}


def one_has_no_deep_sample(config, schedule=RAGGED):
    """Steps in which the deepest block is run by one of two processes only."""
    shares = [
        [LAYERS in depths(drawn(config, step).part(rank, 2).timestep) for rank in (0, 1)]
        for step in range(config.steps)
    ]
    return sum(one != other for one, other in shares)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The folder in which two processes have trained what SHARED names."""
    folder = tmp_path_factory.mktemp("pair")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        script(__file__, folder, RANK=rank, LOCAL_RANK=rank, **shared) for rank in ("0", "1")
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=150)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
            process.wait()
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


def test_a_signal_to_one_process_stops_both_at_the_same_step(pair):
    steps = [(pair / f"stopped-{rank}.txt").read_text() for rank in (0, 1)]
    assert steps == ["3", "3"]


def test_what_two_processes_began_one_can_finish(pair, tmp_path):
    shutil.copytree(pair / "stopped", tmp_path / "run")
    shutil.rmtree(RunDirectory(tmp_path / "run").latest()[1])
    assert latest(tmp_path / "run") == 3
    assert_close(fit(tmp_path / "run", PAIR), fit(tmp_path / "alone", PAIR))


def shared(folder):
    """Train as one of two processes; in the last run the second one gets a signal midway."""
    rank = os.environ["RANK"]

    def on_sample(call, x):
        if rank == "1" and call == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return x

    for name, config in SHARED.items():
        if name == "stopped":
            try:
                fit(folder / name, config, samples=Toy(on_sample))
            except Stopped:
                torch.distributed.barrier()
                (folder / f"{name}-{rank}.txt").write_text(str(latest(folder / name)))
            torch.distributed.barrier()
        torch.save(weights(fit(folder / name, config)), folder / f"{name}-{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    shared(Path(sys.argv[1]))
