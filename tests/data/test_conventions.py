"""Data sets in common forms: the intended labels or a refusal, and a note on every unused file."""

import shutil
import stat
import subprocess
import zipfile

import pytest
from picture_files import levels, png, refused, write_folder, write_zip

from accelkit.data import open_source
from accelkit.errors import AccelkitError, AccelkitWarning

PETS = {"cat/0.png": png(0), "cat/1.png": png(0), "dog/0.png": png(1)}
FLAT = {f"{i}.png": png(i) for i in range(3)}
OTHER = {f"dog/x{i}.{suffix}": b"" for i in range(3) for suffix in ("tif", "gif", "jfif")}


def test_pictures_in_other_formats_are_counted(tmp_path):
    place = write_folder(tmp_path / "d", {**PETS, **OTHER})
    for where in (place, write_zip(tmp_path / "d.zip", {**PETS, **OTHER})):
        with pytest.warns(AccelkitWarning, match=r"9 \(3 \.gif, 3 \.jfif, 3 \.tif\); convert"):
            source = open_source(where)
        assert len(source) == 3


def test_other_files_are_counted(tmp_path):
    files = {"README.md": "", "cat/0.txt": "", "cat/notes.txt": "", "LICENSE": ""}
    source = open_source(write_folder(tmp_path, {**PETS, **files}))
    assert source.notes == ("other files passed over: 3 (1 without a suffix, 1 .md, 1 .txt)",)
    assert source.summary().endswith("; " + source.notes[0])


def test_litter_of_operating_systems_is_not_counted(tmp_path):
    litter = ["Thumbs.db", "cat/desktop.ini", ".DS_Store", "__MACOSX/cat/._0.png", "@eaDir/0.png"]
    source = open_source(write_folder(tmp_path, {**PETS, **dict.fromkeys(litter, b"")}))
    assert (source.classes, len(source), source.notes) == (("cat", "dog"), 3, ())


@pytest.mark.parametrize(
    "name", ["emu.zip", "dog/more.tar", "n01440764.tar", "a.tar.gz", "b.tgz", "c.7z", "D.RAR"]
)
def test_archives_within_are_refused(name, tmp_path):
    with pytest.raises(AccelkitError, match=f"holds archives.*{name}.*unpack them") as error:
        open_source(write_folder(tmp_path, {**PETS, name: b""}))
    assert refused(error)


@pytest.mark.parametrize("files", [{"0.tar": b"", "1.tar": b""}, {"n1.tar": b"", "n2.tar": b""}])
def test_folders_of_archives_are_refused(files, tmp_path):
    with pytest.raises(AccelkitError, match=r"holds archives \(.*2 \.tar\).*unpack them"):
        open_source(write_folder(tmp_path, files))


NESTED = {f"all/{name}": content for name, content in PETS.items()}


def test_files_next_to_the_only_folder_of_a_zip_are_noted(tmp_path):
    stray = {"labels.csv": b"", "labels.txt": b"", "Dataset.json": b"", "c.gif": b""}
    with pytest.warns(AccelkitWarning, match=r"passed over pictures .* 1 \(1 \.gif\); convert"):
        source = open_source(write_zip(tmp_path / "d.zip", {**NESTED, **stray}))
    assert source.classes == ("cat", "dog")
    assert source.notes == ("other files passed over: 3 (1 .csv, 1 .json, 1 .txt)",)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("metadata.parquet", r"all/\.\./metadata\.parquet may hold labels"),
        ("val.zip", r"holds archives \(\.\./val\.zip; 1 \.zip\)"),
    ],
)
def test_labels_and_archives_next_to_the_only_folder_of_a_zip_are_refused(name, words, tmp_path):
    with pytest.raises(AccelkitError, match=words) as error:
        open_source(write_zip(tmp_path / "d.zip", {**NESTED, name: b""}))
    assert refused(error)


@pytest.mark.parametrize("others", [["dog"], []])
def test_a_link_to_nothing_may_be_a_class(others, tmp_path):
    """Without it, as when a disk is not mounted, later classes would have other labels."""
    files = {f"{name}/0.png": png(0) for name in ["cat", *others]}
    folder = write_folder(tmp_path / "d", files)
    (folder / "bird").symlink_to(tmp_path / "nowhere")
    link = zipfile.ZipInfo("bird")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16  # by zip -y
    archive = write_zip(tmp_path / "d.zip", files)
    with zipfile.ZipFile(archive, "a") as out:
        out.writestr(link, "cat")
    for place in (folder, archive):
        with pytest.raises(AccelkitError, match=r"/bird is a link whose target cannot") as error:
            open_source(place)
        assert refused(error)
    (folder / "bird").unlink()
    assert open_source(folder).classes == ("cat", *others)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("d.tar", "the only archives that accelkit reads; unpack it"),
        ("d.tar.gz", "the only archives that accelkit reads; unpack it"),
        ("d.npz", "a file; give digits, a folder of images or a zip"),
        ("d.parquet", "a file; give digits, a folder of images or a zip"),
    ],
)
def test_other_packs_are_refused(name, words, tmp_path):
    with pytest.raises(AccelkitError, match=words):
        open_source(write_folder(tmp_path, {name: b""}) / name)


def test_files_found_instead_of_images_are_counted(tmp_path):
    files = {"data/train-0.parquet": b"", "data/train-1.parquet": b"", "data_batch_1": b""}
    with pytest.raises(AccelkitError, match=r"found 2 \.parquet, 1 without a suffix$"):
        open_source(write_folder(tmp_path, files))


def test_unpacked_shards_with_labels_are_refused(tmp_path):
    files = {f"{i:06d}.{kind}": png(i) if kind == "png" else str(i) for i in range(3)
             for kind in ("png", "cls", "json")}  # fmt: skip
    with pytest.raises(
        AccelkitError, match=r"labels in files such as 000000\.cls.*metadata\.jsonl"
    ):
        open_source(write_folder(tmp_path, files))


def test_shards_are_no_classes(tmp_path):
    """img2dataset names images by the shard's number, then the place in it."""
    files = {f"{s:05d}/{s:05d}{i:04d}.png": png(i) for s in range(2) for i in range(3)}
    texts = {name.replace("png", "txt"): "a caption" for name in files}
    source = open_source(write_folder(tmp_path, {**files, **texts}))
    assert (source.labels, source.classes, len(source.captions)) == (None, (), 6)
    signs = {f"{c:05d}/{c:05d}_{i:05d}.png": png(c) for c in range(2) for i in range(3)}
    assert open_source(write_folder(tmp_path / "signs", signs)).classes == ("00000", "00001")


@pytest.mark.parametrize("parts", [("train", "test"), ("Train", "val", "TEST"), ("img", "images")])
def test_parts_without_classes_are_no_classes(parts, tmp_path):
    """Such as the splits of Hugging Face's imagefolder."""
    files = {f"{part}/{name}": content for part in parts for name, content in FLAT.items()}
    files |= {f"{part}/metadata.csv": "file_name,text\n" + "".join(f"{n},a\n" for n in FLAT)
              for part in parts}  # fmt: skip
    with pytest.raises(
        AccelkitError, match=r"parts of a data set .* name the part, as in"
    ) as error:
        open_source(write_folder(tmp_path, files))
    assert refused(error)
    assert open_source(tmp_path / parts[0]).captions == ("a",) * 3


@pytest.mark.parametrize("folder", ["train", "images", "JPEG"])
def test_one_folder_of_all_images_is_no_class(folder, tmp_path):
    files = {f"{folder}/{name}": content for name, content in FLAT.items()}
    source = open_source(write_folder(tmp_path / "d", files))
    assert (source.labels, source.classes) == (None, ())
    named = {f"{folder}/cat/{name}": content for name, content in FLAT.items()}
    with pytest.raises(AccelkitError, match=f"name the part, as in .*/{folder}$"):
        open_source(write_folder(tmp_path / "named", named))  # otherwise the class would be lost
    assert open_source(tmp_path / "named" / folder).classes == ("cat",)


def test_a_class_may_have_the_name_of_a_part(tmp_path):
    files = {"bus/0.png": png(0), "train/0.png": png(1)}
    assert open_source(write_folder(tmp_path, files)).classes == ("bus", "train")


# Names written by archivers


def same_as_pets(place):
    source = open_source(place)
    assert source.classes == ("cat", "dog")
    assert source.labels.tolist() == levels(source) == [0, 0, 1]


def test_backslashes_in_names(tmp_path):
    same_as_pets(write_zip(tmp_path / "d.zip", {n.replace("/", "\\"): c for n, c in PETS.items()}))


def test_an_archivers_folders_and_links(tmp_path):
    zipper = shutil.which("zip")
    if not zipper:
        pytest.skip("zip is not installed")
    folder = write_folder(tmp_path / "Käfer", {n: c for n, c in PETS.items() if "1" not in n})
    (folder / "cat" / "1.png").symlink_to("0.png")
    subprocess.run([zipper, "-qr", "../d.zip", "."], cwd=folder, check=True)
    same_as_pets(tmp_path / "d.zip")
    subprocess.run([zipper, "-qr", "e.zip", "Käfer"], cwd=tmp_path, check=True)
    same_as_pets(tmp_path / "e.zip")
    same_as_pets(tmp_path / "e.zip" / "Käfer")


@pytest.mark.parametrize("code", ["utf-8", "cp437"])
def test_names_without_the_flag_of_their_code(code, tmp_path):
    """macOS writes UTF-8 without the flag; otherwise the code page is that of DOS."""
    path = write_zip(tmp_path / "d.zip", {"KKKK/0.png": png(0), "Z/0.png": png(1)})
    name = "Käf".encode(code).ljust(4, b"r")
    path.write_bytes(path.read_bytes().replace(b"KKKK", name))
    assert open_source(path).classes == (name.decode(code), "Z")


@pytest.mark.parametrize(
    "name", ["/cat/2.png", "../cat/2.png", "cat/../dog/2.png", "C:\\cat\\2.png", "..\\2.png"]
)
def test_names_that_lead_out_are_refused(name, tmp_path):
    with pytest.raises(AccelkitError, match="a name that leads out of it; pack it again") as error:
        open_source(write_zip(tmp_path / "d.zip", {**PETS, name: png(1)}))
    assert refused(error)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["cat/0.png", "./cat/0.png", "cat\\0.png", "cat//0.png"])
def test_a_name_twice_is_refused(name, tmp_path):
    path = write_zip(tmp_path / "d.zip", PETS)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, png(1))
    with pytest.raises(AccelkitError, match=r"holds cat/0\.png twice"):
        open_source(path)


def test_an_encrypted_zip_is_refused(tmp_path):
    zipper = shutil.which("zip")
    if not zipper:
        pytest.skip("zip is not installed")
    write_folder(tmp_path, PETS)
    subprocess.run([zipper, "-qrP", "x", "d.zip", "cat", "dog"], cwd=tmp_path, check=True)
    with pytest.raises(AccelkitError, match=r"is encrypted .*unpack it with its password"):
        open_source(tmp_path / "d.zip")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compressions_are_refused(method, tmp_path):
    path = write_zip(tmp_path / "d.zip", PETS, compression=method)
    with pytest.raises(AccelkitError, match=f"compressed by method {method} .*unpack it"):
        open_source(path)


def test_a_zip_by_a_name_in_capitals(tmp_path):
    same_as_pets(write_zip(tmp_path / "D.ZIP", PETS))
