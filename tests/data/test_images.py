"""Image sources: what is found, how it is cropped, and what is refused."""

import io
import os
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from accelkit.data.sources import crop_and_resize, iter_images, open_source
from accelkit.errors import AccelkitError


def noise(seed, width=12, height=10):
    draw = np.random.default_rng(seed)
    return Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


FILES = {f"{name}/{i}.png": png(noise(10 * c + i)) for c, name in ((0, "cat"), (1, "dog"))
         for i in range(3)}  # fmt: skip


def write_folder(path, files=FILES):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def write_zip(path, files=FILES, prefix=""):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in random.Random(0).sample(sorted(files.items()), len(files)):
            archive.writestr(prefix + name, content)
    return path


def pixels(source, size=8):
    return np.concatenate([images for _, images in iter_images(source, size, 4)])


def test_a_folder_is_labelled_by_its_sorted_sub_folders(tmp_path):
    source = open_source(write_folder(tmp_path))
    assert source.classes == ("cat", "dog")
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert source.labels.dtype == np.int64
    expected = [crop_and_resize(noise(s), 8) for s in (0, 1, 2, 10, 11, 12)]
    np.testing.assert_array_equal(pixels(source), np.stack(expected))


def box_halved(a):
    """Means of 2x2 pixels, halves up, as Pillow's BOX rounds them in two passes."""
    a = a[: a.shape[0] // 2 * 2, : a.shape[1] // 2 * 2].astype(np.int64)
    wide = (a[:, 0::2] + a[:, 1::2] + 1) // 2
    return ((wide[0::2] + wide[1::2] + 1) // 2).astype(np.uint8)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (32, 64), (64, 72), (128, 64), (16, 24)])
def test_halving_is_a_mean_and_the_crop_is_centred(height, width):
    # sides for which no bicubic step is left: what remains is averaging and cutting
    image = noise(1, width, height)
    a = np.asarray(image)
    while min(a.shape[:2]) >= 32:
        a = box_halved(a)
    top, left = (a.shape[0] - 16) // 2, (a.shape[1] - 16) // 2
    np.testing.assert_array_equal(crop_and_resize(image, 16), a[top : top + 16, left : left + 16])


def cubic(x, a=-0.5):
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def resampling(source, target):
    """Rows of weights of a bicubic filter that widens as it shrinks (Keys 1981, a = -1/2)."""
    scale = max(source / target, 1)
    centres = (np.arange(target) + 0.5) * source / target
    weights = cubic((np.arange(source) + 0.5 - centres[:, None]) / scale)
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("height", "width", "size"), [(20, 27, 16), (11, 9, 16), (31, 31, 16)])
def test_the_rest_is_bicubic(height, width, size):
    calm = np.asarray(noise(2, width, height)) // 2 + 64  # overshoots stay within the bytes
    image = Image.fromarray(calm)
    scale = size / min(height, width)
    high, wide = round(height * scale), round(width * scale)
    smooth = np.einsum(
        "ij,jkc,lk->ilc", resampling(height, high), calm.astype(float), resampling(width, wide)
    )
    top, left = (high - size) // 2, (wide - size) // 2
    expected = smooth[top : top + size, left : left + size].clip(0, 255)
    found = crop_and_resize(image, size)
    assert found.dtype == np.uint8
    assert found.shape == (size, size, 3)
    assert np.abs(found - expected).max() <= 1.5  # Pillow rounds to bytes in between


def test_an_image_of_the_right_size_is_untouched():
    image = noise(3, 16, 16)
    np.testing.assert_array_equal(crop_and_resize(image, 16), np.asarray(image))


def test_folder_zip_and_parts_of_zips_are_the_same_source(tmp_path):
    folder = open_source(write_folder(tmp_path / "d"))
    places = [
        write_zip(tmp_path / "flat.zip"),
        write_zip(tmp_path / "nested.zip", prefix="animals/"),
        write_zip(tmp_path / "deep.zip", prefix="all/train/") / "all" / "train",
    ]
    for place in places:
        source = open_source(place)
        assert source.fingerprint == folder.fingerprint
        assert source.classes == folder.classes
        np.testing.assert_array_equal(source.labels, folder.labels)
        np.testing.assert_array_equal(pixels(source), pixels(folder))


def test_a_part_of_a_zip_leaves_the_rest_out(tmp_path):
    path = tmp_path / "both.zip"
    write_zip(path, {f"train/{n}": c for n, c in FILES.items()} | {"test/cat/9.png": png(noise(9))})
    assert len(open_source(path / "train")) == 6
    test = open_source(f"{path}/test")
    assert test.classes == ("cat",)
    np.testing.assert_array_equal(pixels(test), crop_and_resize(noise(9), 8)[None])
    with pytest.raises(AccelkitError, match=r"no images in .*both\.zip/tes;"):
        open_source(path / "tes")  # no prefix of a name, but a folder
    with pytest.raises(AccelkitError, match=r"no images in .*9\.png;"):
        open_source(path / "test" / "cat" / "9.png")


def test_a_zip_whose_names_begin_with_a_dot(tmp_path):
    source = open_source(write_zip(tmp_path / "dotted.zip", prefix="./"))
    assert source.classes == ("cat", "dog")
    np.testing.assert_array_equal(pixels(source), pixels(open_source(write_folder(tmp_path / "d"))))


def test_images_without_classes(tmp_path):
    flat = {name.replace("/", "-"): content for name, content in FILES.items()}
    for place in (write_folder(tmp_path / "d", flat), write_zip(tmp_path / "d.zip", flat)):
        source = open_source(place)
        assert source.labels is None
        assert source.classes == ()
        assert len(pixels(source)) == 6


def test_what_is_no_image_is_passed_over(tmp_path):
    write_folder(tmp_path)
    for name in ("cat/notes.txt", "README.md", ".hidden/1.png", "dog/.2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"no image")
    plain = open_source(write_zip(tmp_path.parent / "p.zip")).fingerprint
    assert open_source(tmp_path).fingerprint == plain
    mac = {**FILES, "__MACOSX/cat/._0.png": b"no image", "dog/.DS_Store": b"neither"}
    assert open_source(write_zip(tmp_path.parent / "mac.zip", mac)).fingerprint == plain


def test_the_fingerprint_follows_bytes_and_names(tmp_path):
    first = open_source(write_folder(tmp_path / "one")).fingerprint
    assert open_source(write_folder(tmp_path / "two")).fingerprint == first
    one_bit = FILES | {"cat/0.png": FILES["cat/0.png"] + b"\0"}
    renamed = {n.replace("dog", "emu"): c for n, c in FILES.items()}
    swapped = FILES | {"cat/0.png": FILES["dog/0.png"], "dog/0.png": FILES["cat/0.png"]}
    others = [
        open_source(write_folder(tmp_path / str(i), files)).fingerprint
        for i, files in enumerate((one_bit, renamed, swapped))
    ]
    assert len({first, *others}) == 4
    assert open_source("digits").fingerprint == open_source("digits").fingerprint


def as_rgb(image):
    return np.asarray(image.convert("RGB"))


def test_grey_palette_alpha_and_cmyk_become_rgb(tmp_path):
    colour = noise(5, 8, 8)
    grey = Image.fromarray(np.asarray(colour)[..., 0])
    palette = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8), "P")
    palette.putpalette([v for i in range(256) for v in (i, 255 - i, 7)])
    alpha = colour.copy()
    alpha.putalpha(Image.new("L", (8, 8), 128))
    grey.save(tmp_path / "0.png")
    palette.save(tmp_path / "1.png")
    alpha.save(tmp_path / "2.png")
    colour.convert("CMYK").save(tmp_path / "3.jpg", quality=100)
    found = pixels(open_source(tmp_path))
    g = np.asarray(grey)
    np.testing.assert_array_equal(found[0], np.stack([g, g, g], axis=-1))
    index = np.arange(64).reshape(8, 8)
    np.testing.assert_array_equal(found[1], np.stack([index, 255 - index, 0 * index + 7], axis=-1))
    np.testing.assert_array_equal(found[2], np.asarray(colour))
    assert found[3].shape == (8, 8, 3)
    assert np.abs(found[3].astype(float).mean() - np.asarray(colour).mean()) < 8


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_sixteen_bits_of_grey_are_scaled_not_clipped(mode):
    deep = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    image = Image.fromarray(deep) if mode == "I;16" else Image.fromarray(deep.astype(np.int32))
    assert image.mode == mode
    found = crop_and_resize(image, 8)
    assert np.abs(found[..., 0] - deep / 257).max() <= 1
    assert (found == found[..., :1]).all()


def test_a_broken_image_is_named(tmp_path):
    files = FILES | {"cat/1.png": FILES["cat/1.png"][:60]}
    for place in (write_folder(tmp_path / "d", files), write_zip(tmp_path / "d.zip", files)):
        with pytest.raises(AccelkitError, match=r"cat/1\.png .*--skip-bad"):
            pixels(open_source(place))


def test_skipped_images_leave_the_labels_aligned(tmp_path):
    broken = {"cat/1.png": FILES["cat/1.png"][:60], "dog/0.png": b""}
    source = open_source(write_folder(tmp_path, FILES | broken), skip_bad=True)
    indices = np.concatenate([i for i, _ in iter_images(source, 8, 2)])
    assert indices.tolist() == [0, 2, 4, 5]
    assert source.labels[indices].tolist() == [0, 0, 1, 1]
    expected = [crop_and_resize(noise(s), 8) for s in (0, 2, 11, 12)]
    np.testing.assert_array_equal(pixels(source), np.stack(expected))
    assert [any(name in s for s in source.skipped) for name in broken] == [True, True]


def test_nothing_readable_is_refused_even_when_skipping(tmp_path):
    source = open_source(write_folder(tmp_path, {"a.png": b"", "b.png": b"x"}), skip_bad=True)
    with pytest.raises(AccelkitError, match="none of the 2 images"):
        list(iter_images(source, 8, 4))


def test_a_decompression_bomb_is_an_image_that_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    source = open_source(write_folder(tmp_path))
    with pytest.raises(AccelkitError, match="DecompressionBomb"):
        list(iter_images(source, 8, 4))


def test_images_beside_class_folders_are_refused(tmp_path):
    files = FILES | {"loose.png": FILES["cat/0.png"]}
    for place in (write_folder(tmp_path / "d", files), write_zip(tmp_path / "d.zip", files)):
        with pytest.raises(AccelkitError, match=r"loose\.png.*next to class folders"):
            open_source(place)


def test_an_empty_class_folder_is_named(tmp_path):
    folder = write_folder(tmp_path / "d")
    (folder / "bat").mkdir()
    (folder / ".cache").mkdir()
    archive = write_zip(tmp_path / "d.zip")
    with zipfile.ZipFile(archive, "a") as out:
        out.mkdir("bat")
        out.mkdir("__MACOSX")
    for place in (folder, archive):
        with pytest.raises(AccelkitError, match=r"/bat holds no images.*or remove it"):
            open_source(place, skip_bad=True)
    (folder / "bat").rmdir()
    assert open_source(folder).classes == ("cat", "dog")
    notes = write_zip(tmp_path / "n.zip", {"cat/0.png": FILES["cat/0.png"], "notes/a.txt": b"?"})
    with pytest.raises(AccelkitError, match=r"n\.zip/notes holds no images"):
        open_source(notes)  # else the cats would be images without classes
    (tmp_path / "loose" / "empty").mkdir(parents=True)
    assert open_source(write_folder(tmp_path / "loose", {"0.png": b""})).classes == ()


@pytest.mark.parametrize("prefix", ["", "all/"])
def test_parts_of_a_data_set_are_no_classes(tmp_path, prefix):
    files = {f"{part}/{n}": c for part in ("train", "test") for n, c in FILES.items()}
    folder = write_folder(tmp_path / "d", files)
    archive = write_zip(tmp_path / "d.zip", files, prefix)
    for place in (folder, f"{archive}/{prefix}".rstrip("/")):
        with pytest.raises(AccelkitError, match=f"name the part .* as in {place}/test$"):
            open_source(archive if ".zip" in str(place) else place)
        assert open_source(f"{place}/test").classes == ("cat", "dog")


def test_a_class_may_keep_its_images_in_a_folder_of_its_own(tmp_path):
    files = {n.replace("/", "/images/"): c for n, c in FILES.items()}
    source = open_source(write_folder(tmp_path, files))
    assert source.classes == ("cat", "dog")
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_empty_missing_and_corrupt_places_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(AccelkitError, match=r"no images in .*empty"):
        open_source(tmp_path / "empty")
    with pytest.raises(AccelkitError, match=r"no data at .*nowhere"):
        open_source(tmp_path / "nowhere")
    whole = write_zip(tmp_path / "w.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.zip").write_text("no zip")
    for name in ("cut.zip", "text.zip"):
        with pytest.raises(AccelkitError, match=f"cannot read the zip .*{name}"):
            open_source(tmp_path / name)


def test_a_zip_with_a_damaged_member_names_it(tmp_path):
    path = write_zip(tmp_path / "d.zip")
    content = bytearray(path.read_bytes())
    at = content.index(FILES["dog/2.png"][40:70])
    content[at : at + 30] = bytes(30)
    path.write_bytes(content)
    with pytest.raises(AccelkitError, match=r"dog/2\.png \(BadZipFile"):
        pixels(open_source(path))


def test_the_digits_are_themselves():
    from sklearn.datasets import load_digits

    source = open_source("digits")
    _, targets = load_digits(return_X_y=True)
    np.testing.assert_array_equal(source.labels, targets)
    assert source.classes == tuple("0123456789")
    assert source.read(5, 32).shape == (32, 32, 3)
    assert source.read(5, 16).shape == (16, 16, 3)


def test_cifar_as_it_is_distributed():
    folder = os.environ.get("ACCELKIT_DATA")
    if not folder:
        pytest.skip("ACCELKIT_DATA does not name the folder with cifar10.zip")
    path = Path(folder) / "cifar10.zip"
    source = open_source(path / "test")
    assert len(source) == 10_000
    assert source.classes[:2] == ("airplane", "automobile")
    np.testing.assert_array_equal(np.bincount(source.labels), [1000] * 10)
    with zipfile.ZipFile(path) as archive:
        first = min(n for n in archive.namelist() if n.startswith("test/a") and n.endswith(".jpg"))
        with Image.open(archive.open(first)) as image:
            np.testing.assert_array_equal(source.read(0, 32), as_rgb(image))
