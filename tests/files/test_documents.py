"""JSON and TOML from users: read as Python's own readers do, or refused in one line."""

import json
import math
import os
import socket
import string
import tomllib

import pytest
from fuzz import value_or_refusal
from hypothesis import given, settings
from hypothesis import strategies as st

from accelkit.errors import LONGEST, AccelkitError
from accelkit.files.documents import read_json, read_object, read_toml

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("documents") / "a file"


def refused(read, path):
    with pytest.raises(AccelkitError) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message
    assert len(message) <= LONGEST
    assert message.isprintable()
    return message


@settings(deadline=None)
@given(content=PLAIN, bom=st.booleans())
def test_json_is_read_as_by_python(file, content, bom):
    text = json.dumps(content, ensure_ascii=False)
    try:
        file.write_text(text, encoding="utf-8-sig" if bom else "utf-8")
    except UnicodeEncodeError:  # half a surrogate pair can only be written as an escape
        file.write_text(json.dumps(content))
    assert json.dumps(read_json(file)) == json.dumps(json.loads(text))


@settings(deadline=None)
@given(names=st.dictionaries(st.text(string.ascii_letters, min_size=1), st.integers(-9, 9)))
def test_toml_is_read_as_by_python(file, names):
    text = "".join(f"{name} = {value}\n" for name, value in names.items())
    file.write_text(text)
    assert read_toml(file, "the recipe") == tomllib.loads(text) == names


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[" * 50_000, "nested more than 100 deep"),
        (b"[" * 101 + b"]" * 101, "nested more than 100 deep"),
        (b'{"a":' * 50_000, "nested more than 100 deep"),
        (b'{"a": 1, "b": {"c": 2, "c": 3}}', "names 'c' twice in one object"),
        (b'{"a": "\xff"}', "is not UTF-8 text, from byte 7 on"),
        (b"\xff\xfe{\x00}\x00", "is not UTF-8 text, from byte 0 on"),
        (b"9" * 5_000, "a whole number of more than 64 bits"),
        (b"[1, 18446744073709551616]", "a whole number of more than 64 bits"),
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"\x00" * 4096, "Expecting value"),
        (b'{"a": 1} ' + b"x" * 10_000, "Extra data"),
    ],
)
def test_json_that_is_refused(file, content, words):
    file.write_bytes(content)
    assert words in refused(read_json, file)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a = " + b"[" * 50_000, "nested more than 100 deep"),
        (b"a = " + b"{a = " * 50_000, "nested more than 100 deep"),
        (b"[" + b".".join([b"a"] * 5_000) + b"]", "nested more than 100 deep"),
        (b"a = " + b"9" * 5_000, "a whole number of more than 64 bits"),
        (b"a = 0x" + b"f" * 100_000, "a whole number of more than 64 bits"),
        (b"a = 1\na = 2", "Cannot overwrite a value"),
        (b"a = '\xff'", "is not UTF-8 text, from byte 5 on"),
        (b"a = ", "Invalid value"),
    ],
)
def test_toml_that_is_refused(file, content, words):
    file.write_bytes(content)
    message = refused(lambda path: read_toml(path, "the recipe"), file)
    assert message.startswith(f"cannot read the recipe {file}: ")
    assert words in message


@pytest.mark.parametrize(
    ("content", "words"),
    [("[]", "a list"), ("3", "a number"), ('"a"', "a text"), ("null", "null"), ("true", "true")],
)
def test_other_values_than_objects_are_refused(file, content, words):
    file.write_text(content)
    assert f"it holds {words}" in refused(read_object, file)


def test_nan_and_infinities_are_read(file):
    # the config of a scheduler of diffusers has "lambda_min_clipped": -Infinity
    file.write_text('{"a": NaN, "b": -Infinity, "c": 1e400}')
    found = read_object(file)
    assert math.isnan(found["a"])
    assert (found["b"], found["c"]) == (-math.inf, math.inf)


def test_other_things_than_files_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    (tmp_path / "self").symlink_to("self")
    server = socket.socket(socket.AF_UNIX)
    with server:
        server.bind(str(tmp_path / "socket"))
        for name, words in {
            "pipe": "it is a pipe, expected a file",
            "zeros": "it is a device, expected a file",
            "socket": "it is a socket, expected a file",
            ".": "it is a folder, expected a file",
            "self": "symbolic link",
            "gone": "No such file",
        }.items():
            assert words in refused(read_json, tmp_path / name)
            assert words in refused(read_toml, tmp_path / name)
    for name in ("a\0b", "a" * 300, "a" * 5_000):
        with pytest.raises(AccelkitError, match="cannot read"):
            read_json(tmp_path / name)


def test_a_huge_file_is_not_read(tmp_path):
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(2**40)  # sparse, so it takes no room
    assert "expected at most" in refused(read_json, tmp_path / "huge")


@settings(max_examples=100, deadline=None)
@given(
    content=st.binary(max_size=200) | st.text('[]{}",:0123456789.eE+-\\untrfals =\n', max_size=80)
)
def test_anything_is_read_or_refused(file, content):
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    for read in (read_json, read_object, read_toml):
        value_or_refusal(read, file)
