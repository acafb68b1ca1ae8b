"""results.json: what is written can be read, and what is not of its schema is refused."""

import json
import subprocess

import jsonschema
import pytest
from measured import measured, one_row, published

from accelkit.bench import results as module
from accelkit.bench.results import (
    SCHEMA_FILE,
    blank_row,
    commit,
    machine,
    read_results,
    write_results,
)
from accelkit.errors import AccelkitError

SCHEMA = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
SAMPLE = {"method": "D4", "weights": "tuned", "sampler": "ddim", "steps": 50}
SAMPLE["file"] = "samples/D4 tuned.png"
WHOLE = {**measured(), "published": published(), "samples": [SAMPLE]}
SMALL = {**WHOLE, "rows": WHOLE["rows"][:2], "depths": WHOLE["depths"][:1]}


def parts(schema):
    """The schema and all within it."""
    yield schema
    for inner in schema.get("properties", {}).values():
        yield from parts(inner)
    for name in ("items", "additionalProperties"):
        if isinstance(schema.get(name), dict):
            yield from parts(schema[name])


def test_the_schema_is_one_and_describes_every_field():
    VALIDATOR.check_schema(SCHEMA)
    fields = [p for part in parts(SCHEMA) for p in part.get("properties", {}).items()]
    assert len(fields) > 90
    assert not [name for name, field in fields if not field.get("description", "").endswith(".")]


@pytest.mark.parametrize("results", [WHOLE, one_row(), one_row(skipped="not installed")])
def test_results_come_back_as_they_were_written(results, tmp_path):
    VALIDATOR.validate(results)
    path = write_results(tmp_path, results)
    assert path == tmp_path / "results.json"
    assert read_results(path) == results
    assert read_results(tmp_path) == results


def test_a_damaged_file_is_refused(tmp_path):
    """A figure of other digits would be read as another result."""
    path = write_results(tmp_path, WHOLE)
    stored = path.read_text()
    VALIDATOR.validate(json.loads(stored))
    figure = next(row["fid"] for row in WHOLE["rows"] if row["fid"])
    path.write_text(stored.replace(f'"fid": {figure}', f'"fid": {figure + 1}'))
    with pytest.raises(AccelkitError, match=r"results\.json is damaged.*accelkit bench writes it"):
        read_results(tmp_path)
    edited = json.loads(path.read_text())
    del edited["sha256"]
    path.write_text(json.dumps(edited))
    assert figure + 1 in [row["fid"] for row in read_results(tmp_path)["rows"]]


def test_another_version_of_the_schema_is_refused(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"schema": 1, "protocol": {}, "rows": []}))
    with pytest.raises(AccelkitError, match=r"schema version 1.*reads version 2.*measure again"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cannot read"),
        ("{", "cannot read"),
        ("[]", "not of type 'object'"),
        ('{"rows": []}', "'schema' is a required property"),
        (json.dumps({**WHOLE, "rows": []}), r"rows: \[\] should be non-empty"),
        (
            json.dumps({**WHOLE, "rows": WHOLE["rows"][:1] * 2}),
            "more than one row of full original",
        ),
        (
            json.dumps({**SMALL, "samples": [{**SAMPLE, "file": "../a.png"}]}),
            r"samples\[0\].file: '../a.png' does not match",
        ),
        (json.dumps({**SMALL, "notes": ""}), "'notes' was unexpected"),
        (json.dumps(one_row(fid=float("nan"))), r"rows\[0\].fid: nan is not of type"),
    ],
)
def test_what_holds_no_results_is_refused(text, words, tmp_path):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(AccelkitError, match=words):
        read_results(tmp_path)


def test_calls_need_not_be_counted(tmp_path):
    results = {**SMALL, "depths": [{**SMALL["depths"][0], "macs": None}]}
    VALIDATOR.validate(results)
    assert read_results(write_results(tmp_path, results)) == results


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(AccelkitError, match=r"nothing\.json"):
        read_results(tmp_path / "nothing.json")


def test_figures_that_are_not_finite_are_written_as_null(tmp_path):
    row = {"fid": float("inf"), "kid": float("nan"), "fid_jackknife": [1.0, 2.0]}
    read = read_results(write_results(tmp_path, one_row(**row)))["rows"][0]
    assert (read["fid"], read["kid"], read["fid_jackknife"]) == (None, None, [1.0, 2.0])


def test_a_blank_row_has_every_field():
    assert set(blank_row()) == set(SCHEMA["properties"]["rows"]["items"]["required"])
    assert blank_row()["missing"] == {}


def test_the_machine_is_described_as_the_schema_says():
    told = SCHEMA["properties"]["protocol"]["properties"]["machine"]
    jsonschema.validate(machine(), told)
    assert machine()["packages"]["numpy"]


def test_the_commit_is_that_of_a_checkout_alone(tmp_path, monkeypatch):
    def git(*arguments):
        named = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(
            ["git", "-C", tmp_path, *named, *arguments], capture_output=True, text=True, check=True
        ).stdout

    file = tmp_path / "site-packages" / "accelkit" / "bench" / "results.py"
    file.parent.mkdir(parents=True)
    file.touch()
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "a user's own repository")
    monkeypatch.setattr(module, "__file__", str(file))
    assert commit() is None
    (tmp_path / "site-packages").rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "accelkit").rename(tmp_path / "accelkit")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "accelkit" / "bench" / "results.py"))
    git("add", ".")
    git("commit", "-qm", "a checkout")
    head = git("rev-parse", "HEAD").strip()
    assert commit() == head
    (tmp_path / "accelkit" / "bench" / "results.py").write_text("changed")
    assert commit() == f"{head}-dirty"
