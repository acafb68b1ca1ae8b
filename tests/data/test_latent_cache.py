"""Latents in the cache: their values, when they are encoded again, what a failure leaves."""

import errno
import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
import text_pipes
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from accelkit.data import shards as module
from accelkit.data.latents import encode_latents
from accelkit.data.shards import INDEX, default_cache
from accelkit.data.sources import crop_and_resize, open_source
from accelkit.errors import AccelkitError, AccelkitWarning

COUNTS = {"ant": 4, "bee": 3}


def picture(seed):
    draw = np.random.default_rng(seed)
    return Image.fromarray(draw.integers(0, 256, (9, 11, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path):
    for c, (name, count) in enumerate(COUNTS.items()):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(count):
            picture(10 * c + i).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


@pytest.fixture
def vae(pipe):
    vae = pipe.vae.eval()
    vae.register_to_config(scaling_factor=0.3, shift_factor=0.7)
    return vae


@pytest.fixture
def encode(folder, vae, tmp_path):
    """Encode the folder with defaults that can be overridden."""

    def run(source=None, model=None, **options):
        options = {"size": 8, "cache_dir": tmp_path / "cache", "batch": 3, **options}
        return encode_latents(source or open_source(folder), model or vae, **options)

    return run


@torch.no_grad()
def posterior(vae, flip=False):
    """Means and deviations of every image, encoded one by one."""
    seeds = [10 * c + i for c, n in enumerate(COUNTS.values()) for i in range(n)]
    means, stds = [], []
    for seed in seeds:
        pixels = torch.tensor(np.asarray(picture_at_8(seed)), dtype=torch.float32)
        if flip:
            pixels = pixels.flip(1)
        d = vae.encode(pixels.permute(2, 0, 1)[None] / 127.5 - 1).latent_dist
        means.append(d.mean)
        stds.append(d.std)
    return torch.cat(means), torch.cat(stds)


def picture_at_8(seed):
    return crop_and_resize(picture(seed), 8)


def rows(latents):
    """Return the scaled means, which are drawn with no noise."""
    return latents.sample(torch.arange(len(latents)), torch.zeros(len(latents), *latents.shape))


def untouchable(*args, **kwargs):
    raise AssertionError("the autoencoder was called again")


def folders(tmp_path):
    return sorted(p.name for p in (tmp_path / "cache").iterdir() if p.is_dir())


def test_latents_are_those_of_the_autoencoder(encode, vae):
    latents = encode()
    mean, std = posterior(vae)
    assert len(latents) == 7
    assert latents.shape == (4, 8, 8)
    assert latents.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert latents.skipped == 0
    pick = torch.tensor([6, 0, 3, 3])
    noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = (mean[pick] + std[pick] * noise - 0.7) * 0.3
    torch.testing.assert_close(latents.sample(pick, noise), expected)
    assert latents.sample(pick, noise).dtype == torch.float32


def test_an_autoencoder_without_a_shift(encode, vae):
    vae.register_to_config(scaling_factor=0.5, shift_factor=None)
    torch.testing.assert_close(rows(encode()), posterior(vae)[0] * 0.5)


def test_mirrored_images_follow_the_plain_ones(encode, vae):
    latents = encode(flip=True)
    assert len(latents) == 14
    assert latents.labels.tolist() == [0, 0, 0, 0, 1, 1, 1] * 2
    expected = torch.cat([posterior(vae)[0], posterior(vae, flip=True)[0]])
    torch.testing.assert_close(rows(latents), (expected - 0.7) * 0.3)


@pytest.mark.parametrize("shard", [1, 3, 7])
def test_any_number_of_shards_holds_the_same(encode, monkeypatch, shard, tmp_path):
    whole = encode(flip=True, cache_dir=tmp_path / "whole")
    monkeypatch.setattr(module, "SHARD", shard)
    split = encode(flip=True)
    files = list((tmp_path / "cache").glob("*/*.safetensors"))
    assert len(files) >= 14 / shard
    assert max(len(load_file(f)["mean"]) for f in files) <= shard
    torch.testing.assert_close(rows(split), rows(whole))
    assert torch.equal(split.labels, whole.labels)
    monkeypatch.setattr(module, "SHARD", 4096)  # the index records the layout
    assert torch.equal(rows(encode(flip=True)), rows(split))


def test_images_without_classes_have_no_labels(encode, folder):
    assert encode(open_source(folder / "ant")).labels is None


def test_the_second_call_leaves_the_autoencoder_alone(encode, vae, monkeypatch):
    first = rows(encode())
    monkeypatch.setattr(type(vae), "encode", untouchable)
    assert torch.equal(rows(encode()), first)


def test_the_same_images_elsewhere_need_no_encoding(encode, vae, folder, monkeypatch, tmp_path):
    encode()
    folder.rename(tmp_path / "moved")
    monkeypatch.setattr(type(vae), "encode", untouchable)
    assert len(encode(open_source(tmp_path / "moved"))) == 7


def test_weights_data_size_and_flip_each_have_latents_of_their_own(
    encode, vae, folder, make_pipe, tmp_path
):
    encode()
    encode(flip=True)
    encode(size=4)
    assert len(folders(tmp_path)) == 3
    with torch.no_grad():
        vae.quant_conv.bias[0] += 1e-3
    encode()
    picture(99).save(folder / "bee" / "0.png")
    encode()
    assert len(folders(tmp_path)) == 5


def test_a_broken_index_is_written_again(encode, tmp_path):
    first = rows(encode())
    index = next((tmp_path / "cache").glob(f"*/{INDEX}"))
    for content in ("{", "[]", "{}", '{"count": 3, "shard": 4096, "files": [], "skipped": 0}'):
        index.write_text(content)
        with pytest.warns(AccelkitWarning, match="broken"):
            again = encode()
        assert torch.equal(rows(again), first)
        assert json.loads(index.read_text())["count"] == 7
        assert len(folders(tmp_path)) == 1


def flip(place):
    def spoil(content):
        at = int(place * (len(content) - 1))
        return content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :]

    return spoil


def zero(place):
    def spoil(content):
        at = int(place * max(0, len(content) - 4096))
        return content[:at] + bytes(min(4096, len(content))) + content[at + 4096 :]

    return spoil


DAMAGE = {
    **{f"bit at {at}": flip(at) for at in (0, 0.5, 1)},
    **{f"zeros at {at}": zero(at) for at in (0, 1)},
    "second half zeroed": lambda c: c[: len(c) // 2] + bytes(len(c) - len(c) // 2),
}


@pytest.mark.parametrize("name", ["shard-00000.safetensors", INDEX])
def test_damaged_files_are_written_again(encode, tmp_path, name):
    """Values that can still be read are compared with their checksum."""
    first = rows(encode())
    path = next((tmp_path / "cache").glob(f"*/{name}"))
    content = path.read_bytes()
    for damage in DAMAGE.values():
        path.unlink()  # the old file is still mapped
        path.write_bytes(damage(content))
        with pytest.warns(AccelkitWarning, match=r"latents in .* broken \(.*\); encoding again$"):
            again = encode()
        assert torch.equal(rows(again), first)
        assert path.read_bytes() == content


def test_latents_of_earlier_versions_have_no_checksums(encode, vae, monkeypatch, tmp_path):
    first = rows(encode())
    (folder,) = (tmp_path / "cache").glob("*/")
    index = json.loads((folder / INDEX).read_text())
    del index["sha256"]
    (folder / INDEX).write_text(json.dumps(index))
    for shard in folder.glob("*.safetensors"):
        tensors = {name: rows.clone() for name, rows in load_file(shard).items()}
        shard.unlink()
        save_file(tensors, shard)
    monkeypatch.setattr(type(vae), "encode", untouchable)
    assert torch.equal(rows(encode()), first)


def test_all_is_on_the_disk_before_the_rename(encode, monkeypatch, tmp_path):
    flush, rename, events = os.fsync, Path.rename, []

    def flushing(handle):
        events.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        flush(handle)

    def renaming(self, target):
        events.append(f"to {target.parent.name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", flushing)
    monkeypatch.setattr(Path, "rename", renaming)
    encode()
    place = events.index("to cache")
    assert {"shard-00000.safetensors", INDEX} <= set(events[:place])
    assert events[place - 3 :].count("cache") == 1
    assert events[-1] == "cache"


@pytest.mark.parametrize("damage", ["truncated", "missing", "short"])
def test_a_broken_shard_is_written_again(encode, tmp_path, damage):
    first = rows(encode())
    shard = next((tmp_path / "cache").glob("*/shard-*"))
    del first  # the file must not be mapped while it shrinks
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif damage == "missing":
        shard.unlink()
    else:
        save_file({k: v[:-1].clone() for k, v in load_file(shard).items()}, shard)
    with pytest.warns(AccelkitWarning, match="broken"):
        again = encode()
    assert len(again) == 7
    assert torch.equal(rows(again), rows(encode()))


def test_skipped_images_are_counted_and_leave_labels_aligned(encode, folder, vae):
    (folder / "ant" / "1.png").write_bytes(b"broken")
    with pytest.raises(AccelkitError, match=r"ant/1\.png"):
        encode()
    for flip in (False, True):
        latents = encode(open_source(folder, skip_bad=True), flip=flip)
        assert latents.skipped == 1
        assert latents.labels.tolist() == [0, 0, 0, 1, 1, 1] * (1 + flip)
        expected = posterior(vae)[0][[0, 2, 3, 4, 5, 6]]
        torch.testing.assert_close(rows(latents)[:6], (expected - 0.7) * 0.3)
    assert encode(open_source(folder, skip_bad=True)).skipped == 1  # from the cache
    with pytest.raises(AccelkitError, match=r"ant/1\.png"):
        encode()  # although an earlier call skipped the image


def test_progress_counts_images_up_to_the_total(encode):
    seen = []
    encode(flip=True, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(3, 14), (6, 14), (7, 14), (10, 14), (13, 14), (14, 14)]


def test_an_interrupted_encoding_leaves_nothing(encode, tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(progress=interrupt)
    assert folders(tmp_path) == []
    assert len(encode()) == 7


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_folders_of_killed_processes_are_removed_and_those_of_others_kept(encode, folder, tmp_path):
    fork = multiprocessing.get_context("fork")
    started = fork.Event()

    def hold(done, total):
        started.set()
        time.sleep(60)

    options = {"size": 8, "cache_dir": tmp_path / "cache", "progress": hold}
    process = fork.Process(target=encode_latents, args=(open_source(folder), None), kwargs=options)
    process.start()
    try:
        assert started.wait(30)
        (held,) = folders(tmp_path)
        made = encode().path.name
        assert folders(tmp_path) == sorted([held, made])
    finally:
        process.kill()
        process.join()
    assert folders(tmp_path) == sorted([held, made])
    other = encode(flip=True).path.name
    assert folders(tmp_path) == sorted([made, other])


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
    ids=["full", "quota", "safetensors"],
)
def test_no_room_is_one_line_and_leaves_nothing(encode, monkeypatch, tmp_path, error):
    def full(tensors, path, metadata=None):
        path.write_bytes(b"the first bytes")
        raise error

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(
        AccelkitError, match=r"no room to write .*/cache/.*(No space|quota).*ACCELKIT_CACHE"
    ) as caught:
        encode()
    assert "\n" not in str(caught.value)
    assert folders(tmp_path) == []


def test_of_two_encodings_at_a_time_the_first_to_finish_wins(encode, tmp_path):
    others = []

    def meanwhile(done, total):
        if not others:
            others.append(None)
            others.append(encode())

    latents = encode(progress=meanwhile)
    assert torch.equal(rows(latents), rows(others[1]))
    assert len(folders(tmp_path)) == 1


def test_where_the_cache_is(monkeypatch, tmp_path):
    for name in ("ACCELKIT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache("latents") == tmp_path / "home" / ".cache" / "accelkit" / "latents"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache("latents") == tmp_path / "xdg" / "accelkit" / "latents"
    monkeypatch.setenv("ACCELKIT_CACHE", str(tmp_path / "own"))
    assert default_cache("latents") == tmp_path / "own" / "latents"


def test_without_an_autoencoder_the_latents_are_the_pixels(folder, tmp_path):
    source = open_source(folder)
    latents = encode_latents(source, None, size=8, cache_dir=tmp_path / "cache", flip=True)
    assert latents.shape == (3, 8, 8)
    assert latents.labels.tolist() == [0, 0, 0, 0, 1, 1, 1] * 2
    assert latents.places.tolist() == [*range(7)] * 2
    expected = torch.from_numpy(picture_at_8(0)).permute(2, 0, 1) / 127.5 - 1
    noise = torch.randn(2, 3, 8, 8)
    drawn = latents.sample(torch.tensor([0, 7]), noise)
    assert drawn.dtype == torch.float32
    torch.testing.assert_close(drawn[0], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(drawn[1], expected.flip(-1), rtol=0, atol=1e-6)


def test_a_deterministic_autoencoder(folder, tmp_path):
    vae = text_pipes.make("sana").vae
    latents = encode_latents(open_source(folder), vae, size=8, cache_dir=tmp_path / "cache")
    pixels = torch.from_numpy(picture_at_8(0)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        expected = vae.encode(pixels).latent * 0.4
    drawn = latents.sample(torch.tensor([0]), torch.ones(1, *latents.shape))
    torch.testing.assert_close(drawn, expected)
