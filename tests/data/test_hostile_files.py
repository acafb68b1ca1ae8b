"""Endless files, circular links, pictures that fill the memory: refused in time."""

import os
import signal
import tracemalloc
import zipfile

import numpy as np
import pytest
from picture_files import png, refused, write_folder, write_zip
from PIL import Image

from accelkit.data import open_source, sources
from accelkit.data.sources import iter_images
from accelkit.errors import AccelkitError

PETS = {"cat/0.png": png(0), "dog/0.png": png(1)}


@pytest.fixture(autouse=True)
def soon():
    """Interrupt a test that waits for a pipe, which would wait forever."""

    def late(*_):
        pytest.fail("still running after 20 seconds")  # no "except Exception" catches it

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def everything(place, **options):
    source = open_source(place, **options)
    found = np.concatenate([indices for indices, _ in iter_images(source, 8, 16)])
    return source.fingerprint, source.captions, found.tolist()


def pipe(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


def loop(path):
    path.symlink_to(path.name)


STRANGE = [pipe, device, loop]


@pytest.mark.parametrize("make", STRANGE, ids=lambda make: make.__name__)
def test_what_is_no_file_is_a_picture_that_cannot_be_read(make, tmp_path):
    write_folder(tmp_path, PETS)
    make(tmp_path / "cat" / "1.png")
    with pytest.raises(AccelkitError, match=r"cannot read the image .*cat/1\.png") as error:
        everything(tmp_path)
    assert refused(error)
    with pytest.raises(AccelkitError, match=r"cannot read the image .*cat/1\.png"):
        _ = open_source(tmp_path).fingerprint
    assert everything(tmp_path, skip_bad=True)[2] == [0, 2]


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "dataset.json", "cat/0.txt"])
@pytest.mark.parametrize("make", STRANGE, ids=lambda make: make.__name__)
def test_what_is_no_file_holds_no_labels_and_captions(make, name, tmp_path):
    write_folder(tmp_path, {"cat/0.png": png(0)})
    make(tmp_path / name)
    with pytest.raises(AccelkitError, match=f"cannot read .*{name}") as error:
        everything(tmp_path)
    assert refused(error)


@pytest.mark.parametrize("make", STRANGE, ids=lambda make: make.__name__)
def test_what_is_no_file_is_no_class_map_and_no_data(make, tmp_path):
    write_folder(tmp_path / "d", PETS)
    make(tmp_path / "map.json")
    make(tmp_path / "d.zip")
    with pytest.raises(AccelkitError, match="cannot read the class map"):
        open_source(tmp_path / "d", class_map=tmp_path / "map.json")
    with pytest.raises(AccelkitError, match="no data at"):
        open_source(tmp_path / "d.zip")


def test_a_link_to_a_folder_above(tmp_path):
    """Following it would count two images many times."""
    write_folder(tmp_path, PETS)
    (tmp_path / "cat" / "up").symlink_to(tmp_path)
    with pytest.raises(AccelkitError, match=r"are the same folder.*remove the link") as error:
        open_source(tmp_path)
    assert refused(error)


def test_links_that_multiply(tmp_path):
    """Twenty folders with two links each, to the next: a million paths."""
    for i in range(20):
        (tmp_path / f"f{i}").mkdir()
        for name in "ab":
            (tmp_path / f"f{i}" / name).symlink_to(tmp_path / f"f{i + 1}")
    write_folder(tmp_path / "f20", PETS)
    with pytest.raises(AccelkitError, match="are the same folder"):
        open_source(tmp_path / "f0")


def test_links_that_are_meant(tmp_path):
    write_folder(tmp_path / "all", PETS)
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "emu").symlink_to(tmp_path / "all" / "cat")
    (tmp_path / "some" / "owl").mkdir()
    (tmp_path / "some" / "owl" / "1.png").symlink_to(tmp_path / "all" / "dog" / "0.png")
    source = open_source(tmp_path / "some")
    assert source.classes == ("emu", "owl")
    assert everything(tmp_path / "some")[2] == [0, 1]


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    write_folder(tmp_path, PETS)
    scan = os.scandir

    def forbid(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", forbid)  # root can read everything
    with pytest.raises(AccelkitError, match=r"cannot read the folder .*/dog \(Permission denied\)"):
        open_source(tmp_path)


def test_bytes_that_are_no_text_in_a_name(tmp_path):
    write_folder(tmp_path, PETS)
    os.rename(tmp_path / "cat", os.fsencode(tmp_path) + b"/c\xff\n\x1bt")
    source = open_source(tmp_path)
    assert "labels c\\udcff \\x1bt=0, dog=1" in source.summary()
    assert len(source.fingerprint) == 64
    (tmp_path / source.classes[0] / "0.png").write_bytes(b"")
    with pytest.raises(AccelkitError, match="cannot read the image") as error:
        everything(tmp_path)
    assert refused(error)


def test_names_longer_than_a_line(tmp_path):
    files = {"/".join(["x" * 200] * 10) + "/0.png": b"no image", "b/0.png": png(0)}
    with pytest.raises(AccelkitError, match=r"^cannot read .*…x*/0\.png .*--skip-bad$") as error:
        everything(write_folder(tmp_path, files))
    assert refused(error)


# Files that inflate


@pytest.fixture
def bomb(tmp_path, monkeypatch):
    """A zip of 20 KiB with a picture of 20 MiB, where 16 are the limit."""
    monkeypatch.setattr(sources, "MOST_BYTES", 2**24)
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.png", bytes(20 * 2**20))
    return path


def peak(work):
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def refuses(place, words):
    for work in (lambda: open_source(place).fingerprint, lambda: everything(place)):
        with pytest.raises(AccelkitError, match=words) as error:
            work()
        assert refused(error)


def test_a_member_that_inflates_beyond_bounds(bomb):
    assert peak(lambda: refuses(bomb, "it is 20 MiB large, at most 16 are read")) < 2**22


def test_a_member_that_inflates_to_more_than_it_claims(bomb):
    content = bytearray(bomb.read_bytes())
    entry = content.rindex(b"PK\x01\x02")
    content[entry + 24 : entry + 28] = (1000).to_bytes(4, "little")
    bomb.write_bytes(content)
    assert peak(lambda: refuses(bomb, r"BadZipFile: Bad CRC")) < 2**22


def test_a_sparse_file(tmp_path):
    write_folder(tmp_path, PETS)
    os.truncate(tmp_path / "cat" / "0.png", 2**40)
    assert peak(lambda: refuses(tmp_path, "it is 1,048,576 MiB large")) < 2**24
    os.truncate(write_folder(tmp_path, {"metadata.jsonl": ""}) / "metadata.jsonl", 2**40)
    assert peak(lambda: refuses(tmp_path, r"cannot read .*metadata\.jsonl")) < 2**24


def test_a_picture_too_narrow_to_be_enlarged(tmp_path):
    """Its width would become 256, and its length 256 times as long."""
    Image.new("L", (1, 2_800)).save(tmp_path / "0.png")
    source = open_source(tmp_path)

    def read():
        with pytest.raises(AccelkitError, match="it is 1x2800, too narrow for 256x256") as error:
            source.read(0, 256)
        assert refused(error)

    assert peak(read) < 2**24
    assert source.read(0, 8).shape == (8, 8, 3)


def test_pictures_of_other_programs_are_not_run(tmp_path, monkeypatch):
    """Pillow passes PostScript to Ghostscript, whatever the file's suffix."""
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args: pytest.fail("it was run"))
    script = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EOF\n"
    refuses_read = write_folder(tmp_path, {"0.png": script})
    with pytest.raises(AccelkitError, match=r"0\.png \(not in a known format\)"):
        everything(refuses_read)


def test_floating_point_pixels_are_refused(tmp_path):
    """Pillow would clip them at 255, and numbers up to 1 would be black."""
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(
        tmp_path / "0.png", "tiff"
    )
    with pytest.raises(AccelkitError, match=r"0\.png \(its pixels are floating-point numbers"):
        everything(tmp_path)


def test_a_part_of_a_zip_with_a_nested_table(tmp_path):
    place = write_zip(tmp_path / "d.zip", {"a/dataset.json": "[" * 50_000, "a/b/0.png": png(0)})
    with pytest.raises(AccelkitError, match=r"cannot read .*dataset\.json"):
        open_source(place / "a")
