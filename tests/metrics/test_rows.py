import numpy as np
import pytest
from feature_rows import batches_of
from hypothesis import given, settings
from hypothesis import strategies as st

from accelkit.errors import AccelkitError
from accelkit.metrics.rows import BLOCK, blocks, dealt, drawn, parts, shapes


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 2 * BLOCK + 3),
    sizes=st.lists(st.integers(1, 1500), min_size=1, max_size=4),
    share=st.floats(0, 1),
)
def test_blocks_hold_the_chosen_rows_in_order_however_they_come(n, sizes, share):
    rows = np.arange(n)[:, None]
    chosen = drawn(n, round(share * n), 0, 0)
    batches = batches_of(sizes, pooled=rows)
    for wanted, found in (
        (rows, list(blocks(batches, "pooled"))),
        (rows[chosen], list(blocks(batches, "pooled", chosen))),
    ):
        assert [len(b) for b in found[:-1]] == [BLOCK] * (len(found) - 1)
        np.testing.assert_array_equal(np.concatenate([*found, rows[:0]]), wanted)


def gathered(cut, n, count, period, parts_):
    found = [np.zeros(0, dtype=int) for _ in range(parts_)]
    for part, rows in cut(batches_of(pooled=np.arange(n)[:, None]), "pooled", n, count, period):
        found[part] = np.concatenate([found[part], rows[:, 0]])
    return found


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 2 * BLOCK + 3), count=st.integers(1, 12), period=st.integers(1, 150))
def test_parts_are_equal_runs_of_whole_rounds(n, count, period):
    found = gathered(parts, n, count, period, count)
    np.testing.assert_array_equal(np.concatenate(found), np.arange(n))
    assert all(f[0] % period == 0 for f in found if len(f))
    rounds = [len(f) // period for f in found]
    assert max(rounds) - min(rounds) <= 1


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 2 * BLOCK + 3), count=st.integers(1, 12), period=st.integers(1, 150))
def test_rounds_are_dealt_to_groups_of_equally_many_of_each_class(n, count, period):
    *groups, rest = gathered(dealt, n, count, period, count + 1)
    np.testing.assert_array_equal(np.sort(np.concatenate([*groups, rest])), np.arange(n))
    assert len(rest) < count * period
    for i, group in enumerate(groups):
        assert (group // period % count == i).all()
        classes = np.bincount(group % period, minlength=period)
        assert (classes == n // (count * period)).all()


def test_draws_differ_repeat_and_take_no_row_twice():
    first = drawn(50, 20, 7, 0)
    assert len(set(first)) == 20
    assert list(first) == sorted(first)
    np.testing.assert_array_equal(first, drawn(50, 20, 7, 0))
    assert first.tolist() != drawn(50, 20, 7, 1).tolist()
    assert first.tolist() != drawn(50, 20, 8, 0).tolist()
    np.testing.assert_array_equal(drawn(50, 50, 2**32 - 1, 3), np.arange(50))
    # fixed for good: numpy promises this stream
    assert drawn(10, 4, 0, 0).tolist() == [3, 4, 6, 7]


def test_rows_that_do_not_fit_together_are_refused():
    assert shapes(batches_of(pooled=np.ones((5, 3)), spatial=np.ones((5, 2)))) == {
        "pooled": (5, 3),
        "spatial": (5, 2),
    }
    narrow, wide = {"pooled": np.ones((2, 3))}, {"pooled": np.ones((2, 4))}
    with pytest.raises(AccelkitError, match=r"shape \(2, 4\) after 2 rows, expected \(n, 3\)"):
        shapes(lambda: iter([narrow, wide]))
    with pytest.raises(AccelkitError, match=r"pooled features have shape \(3,\)"):
        shapes(lambda: iter([{"pooled": np.ones(3)}]))
    both = {**narrow, "spatial": np.ones((2, 2))}
    with pytest.raises(AccelkitError, match="2 rows of spatial features for 4 images"):
        shapes(lambda: iter([narrow, both]))
