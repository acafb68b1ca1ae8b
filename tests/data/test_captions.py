"""Captions next to images, and their embeddings: read, refused, cached."""

import json
import zipfile

import numpy as np
import pytest
import text_pipes
import torch
from PIL import Image

from accelkit.backbones import backbone_of
from accelkit.backbones.conditioning import conditioning_of
from accelkit.data.prompts import encode_captions
from accelkit.data.sources import open_source
from accelkit.errors import AccelkitError, AccelkitWarning

CAPTIONS = {"a.png": "a red bird", "b/c.png": "zwei Vögel", "b/d.png": "a red bird"}


def pictures(folder, names=CAPTIONS):
    draw = np.random.default_rng(0)
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    return folder


def lines(captions):
    rows = [{"file_name": n, "text": t} for n, t in captions.items()]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows)


def zipped(folder, inside=""):
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in folder.rglob("*"):
            if file.is_file():
                archive.write(file, inside + file.relative_to(folder).as_posix())
    return path


def with_metadata(folder):
    (folder / "metadata.jsonl").write_text(lines(CAPTIONS), encoding="utf-8")


def with_nested_metadata(folder):
    (folder / "metadata.jsonl").write_text(lines({"a.png": "a red bird"}), encoding="utf-8-sig")
    below = {"c.png": "zwei Vögel", "d.png": "a red bird", "gone.png": "nothing"}
    (folder / "b" / "metadata.jsonl").write_text(lines(below), encoding="utf-8")


def with_texts(folder):
    for name, text in CAPTIONS.items():
        (folder / name).with_suffix(".txt").write_text(f" {text}\n", encoding="utf-8")


WAYS = [with_metadata, with_nested_metadata, with_texts]


@pytest.mark.parametrize("inside", [None, "", "top/"], ids=["folder", "zip", "zip with a top"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_captions_are_found(tmp_path, way, inside):
    folder = pictures(tmp_path / "data")
    way(folder)
    source = open_source(folder if inside is None else zipped(folder, inside))
    assert source.captions == tuple(CAPTIONS.values())
    assert source.labels is None  # images beside folders are no classes


def test_captioned_images_in_folders_have_classes_as_well(tmp_path):
    folder = pictures(tmp_path, ["x/a.png", "y/b.png"])
    (folder / "metadata.jsonl").write_text(lines({"x/a.png": "one", "y/b.png": "two"}))
    source = open_source(folder)
    assert source.classes == ("x", "y")
    assert source.captions == ("one", "two")


def test_no_captions(tmp_path):
    folder = pictures(tmp_path, ["a.png", "b.png"])
    (folder / "README.txt").write_text("about these pictures")
    assert open_source(folder).captions is None
    assert open_source("digits").captions is None


def test_captions_leave_the_fingerprint_alone(tmp_path):
    """Latents need not be encoded again because a caption changed."""
    folder = pictures(tmp_path, ["a.png", "b.png"])
    before = open_source(folder).fingerprint
    (folder / "metadata.jsonl").write_text(lines({"a.png": "one", "b.png": "two"}))
    assert open_source(folder).fingerprint == before


def test_an_image_without_a_caption(tmp_path):
    folder = pictures(tmp_path)
    (folder / "metadata.jsonl").write_text(lines({"a.png": "a bird"}))
    with pytest.raises(AccelkitError, match=r"2 of 3 images .* have no caption, e\.g\. b/c\.png"):
        _ = open_source(folder).captions


@pytest.mark.parametrize(
    "line",
    [
        "{",
        '{"file_name": "a.png"}',
        '{"text": "a bird"}',
        '["a.png", "a bird"]',
        '{"file_name": 3}',
    ],
)
def test_a_broken_line_is_named(tmp_path, line):
    folder = pictures(tmp_path)
    good = json.dumps({"file_name": "a.png", "text": "a bird"})
    (folder / "metadata.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(AccelkitError, match=r"line 2 of .*metadata\.jsonl") as caught:
        _ = open_source(folder).captions
    assert "\n" not in str(caught.value)


def test_captions_that_are_no_text(tmp_path):
    folder = pictures(tmp_path, ["a.png"])
    (folder / "a.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(AccelkitError, match=r"cannot read .*a\.txt"):
        _ = open_source(folder).captions


# Embeddings

TEXTS = ["a red bird", "two birds", "a red bird", ""]


@pytest.fixture(scope="module")
def pipe():
    return text_pipes.make("sd3")


@pytest.fixture
def embed(pipe, tmp_path):
    def run(captions=TEXTS, of=None, **options):
        chosen = of or pipe
        conditioning = conditioning_of(backbone_of(chosen.transformer))
        return encode_captions(captions, chosen, conditioning, cache_dir=tmp_path, **options)

    return run


def untouchable(*args, **kwargs):
    raise AssertionError("the text encoders were called again")


@pytest.mark.parametrize("batch", [1, 16])
def test_embeddings_are_the_pipelines_by_sample(pipe, embed, batch):
    indices = torch.tensor([1, 0, 2, 3, 0])
    drop = torch.tensor([False, False, True, False, True])
    rows = embed(batch=batch).rows(indices, drop)
    said = ["two birds", "a red bird", "", "", ""]
    expected, _, pooled, _ = pipe.encode_prompt(said, None, None, do_classifier_free_guidance=False)
    assert set(rows) == {"encoder_hidden_states", "pooled_projections"}
    torch.testing.assert_close(rows["encoder_hidden_states"], expected)
    torch.testing.assert_close(rows["pooled_projections"], pooled)


def test_equal_captions_are_embedded_once(embed):
    seen = []
    embed(progress=lambda done, total: seen.append((done, total)), batch=1)
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_the_second_call_leaves_the_encoders_alone(pipe, embed, monkeypatch):
    first = embed()
    monkeypatch.setattr(type(pipe), "encode_prompt", untouchable)
    every, none = torch.arange(4), torch.zeros(4, dtype=torch.bool)
    again = embed().rows(every, none)
    for name, value in first.rows(every, none).items():
        assert torch.equal(value, again[name])


def other_weights(pipe):
    with torch.no_grad():
        next(pipe.text_encoder_3.parameters()).add_(0.1)


def other_vocabulary(pipe):
    swapped = [*text_pipes.WORDS[:4], *reversed(text_pipes.WORDS[4:])]
    pipe.register_modules(tokenizer=text_pipes.tokenizer(77, swapped))


def folders(path):
    return [entry for entry in path.iterdir() if entry.is_dir()]


@pytest.mark.parametrize("change", [other_weights, other_vocabulary])
def test_other_encoders_have_other_embeddings(embed, monkeypatch, tmp_path, change):
    changed = text_pipes.make("sd3")
    embed(of=changed)
    change(changed)
    embed(of=changed)
    assert len(folders(tmp_path)) == 2


def test_other_captions_have_a_folder_of_their_own(embed, tmp_path):
    embed()
    embed(["two birds"])
    assert len(folders(tmp_path)) == 2


def test_a_broken_folder_is_written_again(embed, tmp_path):
    embed()
    shard = next(tmp_path.rglob("*.safetensors"))
    shard.write_bytes(b"broken")
    with pytest.warns(AccelkitWarning, match="cached text embeddings .* are broken"):
        rows = embed().rows(torch.tensor([0]), torch.tensor([False]))
    assert rows["pooled_projections"].shape == (1, text_pipes.WIDTH)


def test_an_interrupted_encoding_leaves_nothing(embed, tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed(progress=interrupt)
    assert folders(tmp_path) == []
