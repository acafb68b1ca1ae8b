"""Messages are one line that fits a terminal, whatever they quote."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accelkit.errors import LONGEST, AccelkitError, one_line

ANYTHING = st.text(st.characters(), max_size=2_000)  # with surrogates and control characters


@given(ANYTHING, st.integers(20, LONGEST))
def test_any_text_becomes_a_printable_line(text, longest):
    line = one_line(text, longest)
    assert len(line) <= longest
    assert line.isprintable()
    assert one_line(line, longest) == line


@given(st.lists(st.text(st.characters(categories=["L", "N", "P"]), min_size=1), max_size=9))
def test_short_text_stays_as_it_is(words):
    text = " ".join(words)
    if len(text) <= LONGEST:
        assert one_line(text) == text
        assert str(AccelkitError(text)) == text


@pytest.mark.parametrize(
    "given", ["x" * 100_000, "x y " * 25_000, "/a/b" * 25_000, "\x1b[31m" * 9999]
)
def test_the_advice_is_kept_and_the_value_is_cut(given):
    start, end = (
        "unknown schedule '",
        "'; known, nearest first: D1, D3, D4; or a .toml or .json file",
    )
    line = str(AccelkitError(start + given + end))
    assert len(line) <= LONGEST
    assert line.startswith(start + one_line(given)[:20])
    assert line.endswith(end)
    assert "…" in line


def test_characters_that_do_not_print_are_escaped():
    assert one_line("a\n  b\tc") == "a b c"
    assert one_line("\x1b[31m \udcff \ud800 \u202e") == r"\x1b[31m \udcff \ud800 \u202e"
    assert one_line("Vögel – 鳥 🐦") == "Vögel – 鳥 🐦"


def test_args_hold_the_whole_message():
    error = AccelkitError("a\n" * 1_000)
    assert error.args == ("a\n" * 1_000,)
