"""Image sources with stray and unreadable files, threads and forked processes."""

import multiprocessing
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from accelkit.data.sources import iter_images, open_source
from accelkit.errors import AccelkitError

CLASSES = ("cat", "dog")


def picture(seed):
    draw = np.random.default_rng(seed)
    return Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path):
    for c, name in enumerate(CLASSES):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(20):
            picture(100 * c + i).save(tmp_path / "images" / name / f"{i:02d}.png")
    return tmp_path / "images"


@pytest.fixture
def archive(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as out:
        for path in sorted(folder.rglob("*.png")):
            out.write(path, path.relative_to(folder.parent))
    return tmp_path / "images.zip"


@pytest.mark.parametrize("stray", ["__MACOSX/._00.png", ".cache/00.png", "README.md"])
def test_stray_files_make_no_class(folder, archive, stray):
    clean = open_source(folder)
    content = (folder / "cat" / "00.png").read_bytes()
    with zipfile.ZipFile(archive, "a") as out:
        out.writestr(stray, content)
    (folder / stray).parent.mkdir(exist_ok=True)
    (folder / stray).write_bytes(content)
    for place in (folder, archive):
        source = open_source(place)
        assert source.classes == CLASSES
        assert source.fingerprint == clean.fingerprint


def test_resource_forks_are_no_images(folder):
    (folder / "__MACOSX").mkdir()
    picture(0).save(folder / "__MACOSX" / "00.png")
    assert open_source(folder).classes == CLASSES


@pytest.mark.parametrize("where", ["folder", "archive"])
def test_the_fingerprint_follows_one_byte(folder, archive, where, request):
    place = request.getfixturevalue(where)
    before = open_source(place).fingerprint
    changed = folder / "dog" / "07.png"
    content = bytearray(changed.read_bytes())
    times = changed.stat()
    content[-1] ^= 1  # neither name, size nor time differs
    changed.write_bytes(content)
    os.utime(changed, ns=(times.st_atime_ns, times.st_mtime_ns))
    if where == "archive":
        with zipfile.ZipFile(place, "w") as out:
            for path in sorted(folder.rglob("*.png")):
                out.write(path, path.relative_to(folder.parent))
    assert open_source(place).fingerprint != before


def test_a_file_that_is_not_there_is_named_or_skipped(folder):
    whole = open_source(folder).fingerprint
    (folder / "cat" / "99.png").symlink_to("nowhere")
    with pytest.raises(AccelkitError, match=r"cat/99\.png .*--skip-bad"):
        _ = open_source(folder).fingerprint
    source = open_source(folder, skip_bad=True)
    assert source.fingerprint != whole
    assert 20 not in np.concatenate([i for i, _ in iter_images(source, 8, 16)])


def test_skipped_images_are_listed_once_however_often_they_are_read(folder):
    (folder / "cat" / "03.png").write_bytes(b"no image")
    source = open_source(folder, skip_bad=True)
    lists = []
    for _ in range(2):
        assert sum(len(i) for i, _ in iter_images(source, 8, 16)) == 39
        lists.append(list(source.skipped))
    assert lists[0] == lists[1]
    assert len(lists[0]) == 1
    assert "cat/03.png (not in a known format)" in lists[0][0]


def expected():
    return np.stack([np.asarray(picture(100 * c + i)) for c in (0, 1) for i in range(20)])


def test_threads_share_a_zip(archive):
    source = open_source(archive)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: source.read(i % 40, 8), range(400)))
    np.testing.assert_array_equal(np.stack(found), np.tile(expected(), (10, 1, 1, 1)))


def _equal(source, out):
    out.put(
        all((source.read(i, 8) == e).all() for _ in range(10) for i, e in enumerate(expected()))
    )


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_processes_read_a_zip_at_the_same_time(archive):
    source = open_source(archive)
    fork = multiprocessing.get_context("fork")
    out = fork.Queue()
    workers = [fork.Process(target=_equal, args=(source, out)) for _ in range(3)]
    for worker in workers:
        worker.start()
    assert [out.get(timeout=30) for _ in workers] == [True] * 3
    for worker in workers:
        worker.join(30)
