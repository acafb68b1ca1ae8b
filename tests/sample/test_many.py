"""Many images by several processes: their seeds, their shards on disk, and resuming."""

import tracemalloc

import accelerate
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accelkit.errors import AccelkitError, AccelkitWarning
from accelkit.sample import many
from accelkit.sample.generate import Sampling
from accelkit.sample.many import RowShards, Work, World, generate_shards

HOW = Sampling("ddim", 2)


@pytest.fixture
def numbered(monkeypatch):
    """Images that are filled with their seed and their item."""
    calls = []

    def generate(pipe, items, seeds, how):
        calls.append(list(seeds))
        images = np.zeros((len(seeds), 2, 2, 3), np.uint8)
        images[..., 0] = np.array(seeds)[:, None, None] % 256
        images[..., 1] = np.array(items)[:, None, None]
        return images

    monkeypatch.setattr(many, "generate", generate)
    return calls


def rows_of(places, images):
    return {"place": np.array(places), "seed": images[:, 0, 0, 0], "item": images[:, 0, 0, 1]}


def column(shards, name):
    return np.concatenate([rows[name] for rows in shards.batches()])


def make(folder, images=200, batch=8, rank=0, size=1, seed=3):
    work = Work(images, (4, 7, 9), HOW, seed)
    shards = RowShards(folder)
    generate_shards(None, work, batch, rows_of, shards, World(rank, size))
    return shards


def assert_whole(shards, images=200, seed=3):
    assert column(shards, "place").tolist() == list(range(images))
    assert column(shards, "seed").tolist() == [(seed + i) % 256 for i in range(images)]
    assert column(shards, "item").tolist() == [(4, 7, 9)[i % 3] for i in range(images)]


def test_every_image_has_its_own_seed_and_item(numbered, tmp_path):
    assert_whole(make(tmp_path))
    assert max(map(len, numbered)) == 8


@pytest.mark.parametrize("size", [2, 3, 7])
def test_processes_share_the_images(numbered, tmp_path, size):
    def waits():
        raise StopIteration

    work, shares = Work(500, (4, 7, 9), HOW, 3), []
    for rank in range(size):
        shards, world = RowShards(tmp_path), World(rank, size, waits)
        with pytest.raises(StopIteration):  # before any process has written
            generate_shards(None, work, 8, rows_of, shards, world)
        shares.append(shards.missing(500, 64)[rank::size])
    covered = [i for share in shares for part in share for i in part]
    assert sorted(covered) == list(range(500))
    lengths = [sum(map(len, share)) for share in shares]
    assert max(lengths) - min(lengths) <= 64


@given(
    held=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=5),
    images=st.integers(1, 80),
    at_most=st.integers(1, 30),
)
def test_what_is_missing_and_what_is_there_make_the_whole(tmp_path_factory, held, images, at_most):
    shards = RowShards(tmp_path_factory.mktemp("shards"))
    there: set[int] = set()
    for start, length in held:
        places = range(start, start + length)
        if there.isdisjoint(places):
            shards.write(places, {"x": np.zeros(length)})
            there |= set(places)
    gaps = shards.missing(images, at_most)
    assert all(0 < len(gap) <= at_most for gap in gaps)
    assert sorted(i for gap in gaps for i in gap) == sorted(set(range(images)) - there)


def test_a_killed_run_is_resumed_with_other_batches(numbered, tmp_path):
    make(tmp_path, batch=8)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    gone = sorted(kept)[1]
    gone.unlink()
    (tmp_path / "00000000-00000064.safetensors.partial").write_bytes(b"half")
    numbered.clear()
    assert_whole(make(tmp_path, batch=5))
    assert sum(map(len, numbered)) == 64  # only what was gone
    assert {p: p.stat().st_mtime_ns for p in kept if p != gone} == {
        p: t for p, t in kept.items() if p != gone
    }


@pytest.mark.parametrize("damage", ["a bit", "zeros", "cut", "cut to its header", "empty"])
def test_damaged_rows_are_made_again(numbered, tmp_path, damage):
    make(tmp_path)
    victim = sorted(tmp_path.iterdir())[1]
    content = victim.read_bytes()
    victim.write_bytes(
        {
            "a bit": content[:-1] + bytes([content[-1] ^ 1]),
            "zeros": content[:-64] + bytes(64),
            "cut": content[:-8],
            "cut to its header": content[:20],
            "empty": b"",
        }[damage]
    )
    numbered.clear()
    with pytest.warns(AccelkitWarning, match=rf"{victim.name} \(.*\); making its images again"):
        assert_whole(make(tmp_path))
    assert sum(map(len, numbered)) == 64
    assert victim.read_bytes() == content


def test_rows_of_earlier_versions_are_taken(numbered, tmp_path):
    from safetensors.numpy import load_file, save_file

    make(tmp_path)
    for path in tmp_path.iterdir():
        save_file(load_file(path), path)
    numbered.clear()
    assert_whole(make(tmp_path))
    assert numbered == []


def test_an_interrupted_shard_leaves_nothing(numbered, tmp_path):
    def fails(places, images):
        if places.start >= 64:
            raise KeyboardInterrupt
        return rows_of(places, images)

    shards = RowShards(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        generate_shards(None, Work(200, (4,), HOW), 8, fails, shards)
    assert [p.name for p in tmp_path.iterdir()] == ["00000000-00000064.safetensors"]


def test_small_batches_share_a_file(numbered, tmp_path):
    make(tmp_path, images=130, batch=1)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_full_disk_is_named(numbered, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(AccelkitError, match=r"no room to write .*run the same command again"):
        make(tmp_path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"images": 0}, "at least 1 image, got 0"),
        ({"items": ()}, "no class or caption"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32 - 2}, "seed"),
    ],
)
def test_work_that_cannot_be_done_is_refused(change, complaint):
    with pytest.raises(AccelkitError, match=complaint):
        Work(**{"images": 5, "items": (1,), "sampling": HOW, "seed": 0, **change})


@pytest.mark.parametrize("waits", ["wait", "broadcast"])
def test_a_process_that_has_ended_is_reported_in_a_sentence(monkeypatch, waits):
    """In the words of gloo; tests/train/test_two_processes.py kills one."""

    class State:
        process_index, num_processes = 0, 2

        def __init__(self, **options):
            pass

        def wait_for_everyone(self, *values):
            raise RuntimeError("[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::]:1")

    monkeypatch.setattr(accelerate, "PartialState", State)
    monkeypatch.setattr(accelerate.utils, "broadcast_object_list", State().wait_for_everyone)
    world = World.launched()
    with pytest.raises(AccelkitError, match="another of the 2 processes has ended"):
        world.wait() if waits == "wait" else world.broadcast(None)


def test_batches_of_nothing_are_refused(tmp_path):
    with pytest.raises(AccelkitError, match="at least 1 image, got 0"):
        make(tmp_path, batch=0)


def test_memory_does_not_grow_with_the_images(numbered, tmp_path):
    """4,000 rows of 16 KiB are 64 MiB, a shard of 64 rows is 1 MiB."""

    def pooled(places, images):
        return {"pooled": np.ones((len(places), 4096), np.float32)}

    shards = RowShards(tmp_path)
    tracemalloc.start()
    try:
        generate_shards(None, Work(4000, (4,), HOW), 64, pooled, shards)
        assert sum(len(rows["pooled"]) for rows in shards.batches()) == 4000
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()
