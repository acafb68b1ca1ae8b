"""Token merging as tensor functions, against a loop over samples and tokens."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accelkit.errors import AccelkitError
from accelkit.runtime.merging import match, merge, unmerge

RATIOS = [0.25, 0.5, 0.75]
# tomesd 0.1.3 (no_rand) on cos(0.7 n^2 + j), n < 24 tokens of 4 x 6, j < 5, at RATIOS: the
# index of each merged token and of the destination that it joins.
RECORDED = [
    {3: 0, 5: 4, 6: 0, 7: 2, 9: 12, 13: 14},
    {3: 0, 5: 4, 6: 0, 7: 2, 9: 12, 11: 2, 13: 14, 15: 12, 18: 12, 20: 16, 22: 0, 23: 0},
    {1: 12, 3: 0, 5: 4, 6: 0, 7: 2, 8: 12, 9: 12, 10: 12, 11: 2, 13: 14, 15: 12, 17: 12, 18: 12,
     19: 12, 20: 16, 21: 12, 22: 0, 23: 0},
]  # fmt: skip


def draw(batch, count, width=8, seed=0):
    return torch.randn(batch, count, width, generator=torch.Generator().manual_seed(seed))


def naive_joins(tokens, height, width, ratio):
    """The destination of every merged token of one sample's map (N, D)."""
    numbers = range(height * width)
    first = [n for n in numbers if n // width % 2 == 0 and n % width % 2 == 0]
    found = []
    for n in numbers:
        if n in first:
            continue
        cosines = [
            np.dot(tokens[n], tokens[d]) / (np.linalg.norm(tokens[n]) * np.linalg.norm(tokens[d]))
            for d in first
        ]
        nearest = max(range(len(first)), key=lambda i: (cosines[i], -i))
        found.append((-cosines[nearest], n, first[nearest]))
    merged = sorted(found)[: int(ratio * (height * width))]
    return {n: destination for _, n, destination in merged}


def naive_round_trip(values, joins):
    """Every token of one sample (N, D) replaced by the mean of those it was merged with."""
    result = np.array(values)
    for destination in set(joins.values()):
        members = [destination, *(n for n, d in joins.items() if d == destination)]
        result[members] = np.mean([values[n] for n in members], axis=0)
    return result


def joins_of(tokens, grid, ratio, protected=0):
    """The same by the functions under test, read from a merged identity matrix."""
    matching = match(tokens[None], grid, ratio, protected)
    if matching is None:
        return {}
    count = len(tokens)
    shares = unmerge(merge(torch.eye(count)[None], matching), matching)[0]
    joins = {}
    for number, row in enumerate(shares):
        members = row.nonzero().flatten().tolist()
        at = [divmod(n - protected, grid[1]) for n in members]
        heads = [n for n, (y, x) in zip(members, at, strict=True) if not (y % 2 or x % 2)]
        if len(members) > 1 and number not in heads:
            joins[number] = heads[0]
    return joins


@settings(max_examples=60, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    ratio=st.floats(0.01, 0.75),
    protected=st.integers(0, 2),
    batch=st.integers(1, 3),
    seed=st.integers(0, 10**6),
)
def test_it_is_what_a_loop_does(grid, ratio, protected, batch, seed):
    height, width = grid
    tokens = draw(batch, protected + height * width, seed=seed)
    values = draw(batch, protected + height * width, 5, seed=seed + 1)
    matching = match(tokens, grid, ratio, protected)
    joins = [naive_joins(t.double().numpy(), *grid, ratio) for t in tokens[:, protected:]]
    if matching is None:
        assert not any(joins)
        return
    merged = merge(values, matching)
    assert merged.shape == (batch, values.shape[1] - len(joins[0]), 5)
    result = unmerge(merged, matching)
    assert torch.equal(result[:, :protected], values[:, :protected])
    for sample, value, join in zip(result, values[:, protected:], joins, strict=True):
        expected = naive_round_trip(value.numpy(), join)
        torch.testing.assert_close(sample[protected:], torch.from_numpy(expected))


@pytest.mark.parametrize(("ratio", "expected"), list(zip(RATIOS, RECORDED, strict=True)))
def test_it_is_what_tomesd_merges(ratio, expected):
    numbers = torch.arange(24.0)[:, None]
    tokens = torch.cos(0.7 * numbers * numbers + torch.arange(5.0))
    assert joins_of(tokens, (4, 6), ratio) == expected
    front = torch.cat([tokens[:2], tokens])  # protected, though they equal tokens of the map
    shifted = {n + 2: d + 2 for n, d in expected.items()}
    assert joins_of(front, (4, 6), ratio, protected=2) == shifted


@settings(max_examples=40, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    ratio=st.floats(0.05, 0.75),
    seed=st.integers(0, 10**6),
)
def test_equal_similarities_go_to_the_earlier(grid, ratio, seed):
    count = grid[0] * grid[1]
    kinds = torch.randint(3, (count,), generator=torch.Generator().manual_seed(seed))
    tokens = torch.eye(3)[kinds]  # similarities are 0 and 1, exactly
    expected = naive_joins(tokens.numpy(), *grid, ratio)
    assert joins_of(tokens, grid, ratio) == expected


@pytest.mark.parametrize("grid", [(4, 4), (5, 3), (1, 6), (2, 7)])
@pytest.mark.parametrize("ratio", [0.3, 0.75])
def test_tokens_that_stay_alone_keep_every_bit_and_equal_ones_their_value(grid, ratio):
    tokens = draw(2, grid[0] * grid[1])
    matching = match(tokens, grid, ratio)
    result = unmerge(merge(tokens, matching), matching)
    alone = merge(tokens, matching).shape[1] - matching.destinations
    for row in range(2):
        untouched = matching.order[row, :alone]
        assert torch.equal(result[row, untouched], tokens[row, untouched])
    constant = torch.full_like(tokens, 0.375)
    assert torch.equal(unmerge(merge(constant, matching), matching), constant)


@pytest.mark.parametrize("protected", [0, 2])
def test_the_merged_sequence_is_those_alone_and_then_the_destinations(protected):
    tokens = draw(3, protected + 20)
    matching = match(tokens, (4, 5), 0.4, protected)
    assert matching.order.sort(dim=1).values.tolist() == [list(range(20 + protected))] * 3
    heads = [n + protected for n in (0, 2, 4, 10, 12, 14)]
    assert matching.destinations == 6
    assert matching.order[:, -14:-8].tolist() == [heads] * 3  # before the eight that are merged
    assert matching.order[:, :protected].tolist() == [list(range(protected))] * 3


def test_a_sample_is_matched_as_if_it_were_alone():
    tokens = draw(5, 2 + 8 * 7, width=16)
    together = match(tokens, (8, 7), 0.6, 2)
    for row in range(5):
        alone = match(tokens[row : row + 1], (8, 7), 0.6, 2)
        for name in ("order", "target", "place"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[row]), name


def test_nothing_is_drawn():
    tokens = draw(2, 36)
    state = torch.get_rng_state()
    first, second = match(tokens, (6, 6), 0.5), match(tokens, (6, 6), 0.5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, first[:3], second[:3]))


@pytest.mark.parametrize(
    ("grid", "ratio"), [((4, 4), 0.06), ((1, 1), 0.75), ((3, 3), 0.1), ((10, 10), 0.009)]
)
def test_less_than_one_token_is_none(grid, ratio):
    assert match(draw(2, grid[0] * grid[1]), grid, ratio) is None


@pytest.mark.parametrize(("grid", "left"), [((4, 4), 4), ((3, 3), 4), ((5, 4), 6), ((1, 4), 2)])
def test_no_destination_is_ever_merged(grid, left):
    tokens = draw(1, grid[0] * grid[1])
    assert merge(tokens, match(tokens, grid, 0.75)).shape[1] >= left


def test_a_map_of_another_size_is_refused():
    with pytest.raises(AccelkitError, match="map of 4 x 4 behind 1 others, got 16 tokens"):
        match(draw(1, 16), (4, 4), 0.5, protected=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_are_kept_and_matched_in_float32(dtype):
    tokens = draw(2, 64).to(dtype)
    matching, plain = match(tokens, (8, 8), 0.5), match(tokens.float(), (8, 8), 0.5)
    assert torch.equal(matching.order, plain.order)
    merged = merge(tokens, matching)
    assert merged.dtype == unmerge(merged, matching).dtype == dtype
    torch.testing.assert_close(merged.float(), merge(tokens.float(), plain), atol=0.02, rtol=0.01)


def test_autocast_changes_nothing():
    tokens = draw(2, 64)
    plain = match(tokens, (8, 8), 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        matching = match(tokens, (8, 8), 0.5)
        merged = merge(tokens, matching)
    assert torch.equal(matching.order, plain.order)
    assert torch.equal(merged, merge(tokens, plain))


def test_shapes_are_known_without_values():
    tokens = torch.empty(2, 1 + 15, 4, device="meta")
    matching = match(tokens, (3, 5), 0.4, 1)
    merged = merge(tokens, matching)
    assert (merged.shape, merged.device.type) == ((2, 10, 4), "meta")
    assert unmerge(merged, matching).shape == tokens.shape


def test_gradients_are_those_of_the_means():
    tokens = draw(2, 2 + 15, 3).double().requires_grad_()
    matching = match(tokens, (3, 5), 0.5, 2)
    assert not any(part.requires_grad for part in matching[:3])
    assert torch.autograd.gradcheck(lambda x: unmerge(merge(x, matching), matching), tokens)


def test_it_compiles_whole():
    def round_trip(tokens):
        matching = match(tokens, (5, 6), 0.6, 1)
        return unmerge(merge(tokens, matching), matching)

    tokens = draw(3, 31)
    compiled = torch.compile(round_trip, backend="eager", fullgraph=True)
    assert torch.equal(compiled(tokens), round_trip(tokens))
