"""``metadata.jsonl`` and ``metadata.csv``: labels and captions by row, or a refusal."""

import csv
import io
import json

import pytest
from picture_files import levels, png, refused, write_folder, write_zip

from accelkit.data import open_source
from accelkit.errors import AccelkitError, AccelkitWarning

NAMES = ["a.png", "b/c.png", "b/d.png"]
FILES = {name: png(level) for level, name in enumerate(NAMES)}
FLAT = {f"{i}.png": png(i) for i in range(12)}


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def table(rows):
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


FORMS = {"metadata.jsonl": jsonl, "metadata.csv": table}


@pytest.fixture(params=FORMS)
def described(request, tmp_path):
    """Write images with rows next to them, in either form."""

    def write(rows, files=FLAT):
        return write_folder(tmp_path, {**files, request.param: FORMS[request.param](rows)})

    return write


def test_captions_by_row(described):
    texts = ['a "red" bird, at rest', "zwei Vögel\nim Wind", "3"]
    rows = [{"file_name": n, "text": t} for n, t in zip(NAMES, texts, strict=True)]
    place = described(rows[::-1], FILES)
    source = open_source(place)
    assert source.captions == tuple(texts)
    assert source.labels is None
    assert source.summary().endswith("/" + place.name + ", without classes, with captions")


def test_numbers_are_labels(described):
    rows = [{"file_name": name, "label": 2 * i} for i, name in enumerate(FLAT)]
    source = open_source(described(rows))
    assert source.labels.tolist() == [2 * level for level in levels(source)]
    assert source.class_labels == tuple(range(0, 24, 2))
    assert source.names == {2 * i: str(2 * i) for i in range(12)}


def test_numbers_that_a_column_with_gaps_has_made_fractions(tmp_path):
    rows = [{"file_name": name, "label": f"{i}.0"} for i, name in enumerate(FLAT)]
    source = open_source(write_folder(tmp_path, {**FLAT, "metadata.csv": table(rows)}))
    assert source.labels.tolist() == levels(source)  # and 10.0 does not come before 2.0


def test_names_are_classes_in_their_order(described):
    names = {name: ("wolf", "ant", "Bee")[i % 3] for i, name in enumerate(FLAT)}
    source = open_source(described([{"file_name": n, "label": c} for n, c in names.items()]))
    assert source.classes == ("Bee", "ant", "wolf")
    assert source.labels.tolist() == [(2, 1, 0)[level % 3] for level in levels(source)]


def test_labels_take_precedence_over_folders(described):
    files = {f"{'xy'[i % 2]}/{i}.png": png(i) for i in range(4)}
    rows = [{"file_name": name, "label": 5 + i} for i, name in enumerate(files)]
    source = open_source(described(rows, files))
    assert source.labels.tolist() == [5 + level for level in levels(source)]


def test_rows_of_a_folder_next_to_images_of_a_zip(tmp_path):
    """The zip's only folder is not listed alone, without the rows next to it."""
    files = {f"images/{name}": content for name, content in FLAT.items()}
    rows = [{"file_name": name, "text": f"number {i}"} for i, name in enumerate(files)]
    content = {**files, "metadata.csv": table(rows)}
    for place in (write_zip(tmp_path / "d.zip", content), write_folder(tmp_path / "d", content)):
        source = open_source(place)
        assert source.captions == tuple(f"number {level}" for level in levels(source))
        assert source.classes == ()


def test_other_columns_and_rows_without_an_image_are_noted(described):
    rows = [{"file_name": n, "text": "t", "bbox": 1} for n in [*FLAT, "gone.png"]]
    source = open_source(described(rows))
    assert source.notes == ("rows that name no image: 1", "columns not read: bbox")
    assert "columns not read: bbox" in source.summary()


def test_a_table_without_captions_has_none(described):
    source = open_source(described([{"file_name": n, "caption": "t"} for n in FLAT]))
    assert source.captions is None
    assert source.notes == ("columns not read: caption",)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"file_name": n, "text": 7} for n in FLAT], "line 1 of .*its text is 7, expected text"),
        ([{"file_name": n, "text": None} for n in FLAT], "its text is None"),
        ([{"file_name": n, "text": ["a", "b"]} for n in FLAT], r"its text is \['a', 'b'\]"),
        ([{"file_name": n, "text": {"en": "a"}} for n in FLAT], "its text is {"),
        ([{"file_name": n, "text": "\ud800"} for n in FLAT], "surrogates not allowed"),
        ([{"file_name": n, "label": True} for n in FLAT], "its label is True, neither"),
        ([{"file_name": n, "label": 1.5} for n in FLAT], "its label is 1.5"),
        ([{"file_name": n, "label": -1} for n in FLAT], "its label is -1"),
        ([{"file_name": n, "label": None} for n in FLAT], "its label is None"),
        ([{"file_name": n, "label": [1, 2]} for n in FLAT], r"its label is \[1, 2\]"),
        ([{"file_name": n, "label": " "} for n in FLAT], "its label is ' '"),
        ([{"file_name": n, "label": i or "x"} for i, n in enumerate(FLAT)], "partly numbers"),
        ([{"text": "a"}], "line 1 of .*no file_name"),
        ([{"file_name": "", "text": "a"}], "line 1 of .*no file_name"),
        (
            [{"file_name": n, **({"text": "a"} if i else {})} for i, n in enumerate(FLAT)],
            "line 1 of .*no text",
        ),
        (
            [{"file_name": n, **({} if i == 4 else {"label": 1})} for i, n in enumerate(FLAT)],
            "line 5 of .*no label",
        ),
    ],
)
def test_rows_of_another_form_are_refused(rows, words, tmp_path):
    place = write_folder(tmp_path, {**FLAT, "metadata.jsonl": jsonl(rows)})
    with pytest.raises(AccelkitError, match=words) as error:
        open_source(place)
    assert refused(error)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("file_name,text\n0.png\n", "line 2 of .*1 cells under 2 columns"),
        ("file_name,text\n0.png,a,b\n", "line 2 of .*3 cells under 2 columns"),
        ('file_name,text\n0.png,"a', "line 2 of .*unexpected end of data"),
        ("file_name,text,text\n0.png,a,b\n", "line 1 of .*two columns of one name"),
        ("image,text\n0.png,a\n", "line 1 of .*no column file_name"),
        ("file_name;text\n0.png;a, b\n", "line 1 of .*separated by semicolons, expected commas"),
        ("file_name\ttext\n0.png\ta\n", "line 1 of .*separated by tabs, expected commas"),
        ("text;file_name\n", "line 1 of .*separated by semicolons"),
        ("file_name,label\n0.png,-1\n1.png,0\n", "line 2 of .*its label is -1.0, neither"),
        ("file_name,label\n0.png,1\n1.png,0.5\n", "line 3 of .*its label is 0.5, neither"),
        ("file_name,label\n0.png,nan\n1.png,1\n", "line 2 of .*its label is nan, neither"),
        ("file_name,label\n0.png,cat\n1.png,NaN\n", "line 3 of .*its label is nan, neither"),
        ("file_name,label\n0.png,12345678901\n", "line 2 of .*its label is 12345678901.0"),
        (
            "file_name,label\n" + "".join(f"{n},{i or 'x'}\n" for i, n in enumerate(FLAT)),
            "partly numbers and partly names",
        ),
        ("file_name,label\n0.png,\n", "line 2 of .*its label is ''"),
        ("file_name,text\n0.png," + 200_000 * "a", "line 2 of .*larger than field limit"),
    ],
)
def test_tables_of_another_form_are_refused(content, words, tmp_path):
    place = write_folder(tmp_path, {**FLAT, "metadata.csv": content})
    with pytest.raises(AccelkitError, match=words) as error:
        open_source(place)
    assert refused(error)


def test_spaces_after_commas_belong_to_no_name(tmp_path):
    cells = "".join(f"{name}, {'ab'[i % 2]}, 1\n" for i, name in enumerate(FLAT))
    text = f"file_name, label, box\n{cells}"
    source = open_source(write_folder(tmp_path, {**FLAT, "metadata.csv": text}))
    assert source.classes == ("a", "b")
    assert source.labels.tolist() == [level % 2 for level in levels(source)]
    assert source.notes == ("columns not read: box",)


def test_a_column_without_a_name_is_noted(tmp_path):
    """Pandas writes its index in such a column."""
    text = ",file_name,label\n" + "".join(f"{i},{n},{i}\n" for i, n in enumerate(FLAT))
    source = open_source(write_folder(tmp_path, {**FLAT, "metadata.csv": text}))
    assert source.notes == ("columns not read: one without a name",)


@pytest.mark.parametrize("column", ["text", "label"])
def test_rows_of_images_elsewhere_are_refused(described, column):
    rows = [{"file_name": f"/elsewhere/{name}", column: "a"} for name in FLAT]
    with pytest.raises(AccelkitError, match=r"/elsewhere/0\.png; write each file_name") as error:
        open_source(described(rows))
    assert refused(error)


def test_two_rows_for_an_image_are_refused(described):
    twice = [{"file_name": n, "text": "a"} for n in [*FLAT, "./3.png"]]
    with pytest.raises(AccelkitError, match=r"3\.png has two rows, line .* and line .*"):
        open_source(described(twice))


def test_two_files_that_describe_an_image_are_refused(tmp_path):
    rows = jsonl([{"file_name": "c.png", "text": "a"}, {"file_name": "d.png", "text": "b"}])
    above = jsonl([{"file_name": n, "text": "c"} for n in NAMES])
    files = {**FILES, "metadata.jsonl": above, "b/metadata.jsonl": rows}
    with pytest.raises(AccelkitError, match=r"b/c\.png has two rows"):
        open_source(write_folder(tmp_path, files))


def test_a_table_in_another_format_is_refused(tmp_path):
    place = write_folder(tmp_path, {**FLAT, "metadata.parquet": b""})
    with pytest.raises(AccelkitError, match=r"metadata\.parquet may hold .*save it as one of them"):
        open_source(place)


def test_a_missing_label_is_refused(described):
    with pytest.raises(AccelkitError, match=r"1 of 12 images .* have no label, e\.g\. 9\.png"):
        open_source(described([{"file_name": n, "label": 1} for n in list(FLAT) if n != "9.png"]))


def test_labels_in_two_places_are_refused(described):
    rows = [{"file_name": name, "label": 1} for name in FLAT]
    table = json.dumps({"labels": [[name, 2] for name in FLAT]})
    with pytest.raises(AccelkitError, match=r"labels both in dataset\.json and in metadata"):
        open_source(described(rows, {**FLAT, "dataset.json": table}))


def test_empty_captions_warn(described):
    source = open_source(described([{"file_name": n, "text": " " * (n < "2")} for n in FLAT]))
    with pytest.warns(AccelkitWarning, match=r"12 of 12 images .* an empty caption, e\.g\. 0\.png"):
        assert len(source.captions) == 12


def test_a_stray_text_takes_no_classes_away(tmp_path):
    files = {"cat/0.png": png(0), "dog/0.png": png(1), "cover.png": png(2), "cover.txt": "pets"}
    with pytest.raises(AccelkitError, match=r"2 of 3 images .* have no caption"):
        open_source(write_folder(tmp_path, files))


def test_suffixes_of_either_case_belong_together(tmp_path):
    files = {"A.PNG": png(0), "A.TXT": "one", "b.Png": png(1), "b.txt": "two"}
    source = open_source(write_folder(tmp_path, files))
    assert source.captions == ("one", "two")
    assert source.notes == ()


def test_other_labels_have_another_fingerprint(described):
    first = open_source(described([{"file_name": n, "label": "a"} for n in FLAT])).fingerprint
    rows = [{"file_name": n, "label": "ab"[i % 2]} for i, n in enumerate(FLAT)]
    assert open_source(described(rows)).fingerprint != first
