"""A step's random numbers: determined by seed and step, every sample once an epoch."""

import itertools

import pytest
import torch
from scipy import stats

from accelkit.train.draws import draw, generator


def whole(steps):
    return lambda count, rng: torch.randint(steps, (count,), generator=rng)


HOW = {"size": 10, "shape": (2, 3, 3), "timesteps": whole(1000), "dropout": 0.5}
FIELDS = ("rows", "timestep", "posterior", "noise", "drop")


def equal(one, other):
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in FIELDS)


def test_shapes_and_dtypes():
    drawn = draw(0, 0, 4, **HOW)
    assert [getattr(drawn, name).shape for name in FIELDS] == [
        (4,),
        (4,),
        *[(4, 2, 3, 3)] * 2,
        (4,),
    ]
    assert [getattr(drawn, name).dtype for name in FIELDS] == [
        *[torch.int64] * 2,
        *[torch.float32] * 2,
        torch.bool,
    ]


def test_depends_on_seed_and_step_alone():
    first = draw(3, 7, 4, **HOW)
    for step in (0, 1, 30):  # whatever was drawn before
        draw(5, step, 8, **{**HOW, "size": 11})
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert equal(first, draw(3, 7, 4, **HOW))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("other", [(4, 7), (3, 8), (7, 3), (0, 0)])
def test_other_seeds_and_steps_draw_other_numbers(other):
    one, two = draw(3, 7, 64, **HOW), draw(*other, 64, **HOW)
    for name in ("timestep", "posterior", "noise", "drop"):
        assert not torch.equal(getattr(one, name), getattr(two, name))
    for name in ("posterior", "noise"):
        numbers = torch.stack([getattr(one, name).flatten(), getattr(two, name).flatten()])
        assert torch.corrcoef(numbers)[0, 1].abs() < 0.15


def test_seeds_shuffle_differently():
    how = {**HOW, "size": 100}
    assert not torch.equal(draw(0, 0, 100, **how).rows, draw(1, 0, 100, **how).rows)


def test_posterior_and_noise_are_independent():
    drawn = draw(0, 0, 500, **HOW)
    numbers = torch.stack([drawn.posterior.flatten(), drawn.noise.flatten()])
    assert torch.corrcoef(numbers)[0, 1].abs() < 0.04


@pytest.mark.parametrize(("size", "batch"), [(10, 4), (10, 10), (7, 3), (3, 8), (1, 2)])
def test_every_sample_once_an_epoch(size, batch):
    """Also when batches straddle epochs or hold more than one."""
    how = {**HOW, "size": size}
    rows = torch.cat([draw(0, step, batch, **how).rows for step in range(4 * size)])
    epochs = rows.split(size)
    assert len(epochs) == 4 * batch
    assert all(epoch.sort().values.tolist() == list(range(size)) for epoch in epochs)


def test_epochs_are_shuffled_differently():
    how = {**HOW, "size": 50}
    epochs = [draw(0, step, 50, **how).rows for step in range(4)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(epochs, 2))
    assert not torch.equal(epochs[0], torch.arange(50))


@pytest.mark.parametrize(("processes", "parts"), [(1, 1), (2, 1), (1, 3), (2, 3), (4, 3)])
def test_parts_partition_the_batch(processes, parts):
    whole = draw(0, 0, 12, **HOW)
    shares = [
        whole.part(p, processes).part(i, parts) for p in range(processes) for i in range(parts)
    ]
    assert {len(share.rows) for share in shares} == {12 // processes // parts}

    def samples(*draws):
        columns = [torch.cat([getattr(d, name) for d in draws]).flatten(1) for name in FIELDS[2:4]]
        flat = [
            torch.cat([getattr(d, name) for d in draws]) for name in ("rows", "timestep", "drop")
        ]
        return sorted(torch.cat([*(f[:, None] for f in flat), *columns], dim=1).tolist())

    assert samples(*shares) == samples(whole)


def test_label_dropout_changes_nothing_else():
    none, some, all_ = (draw(0, 3, 64, **{**HOW, "dropout": share}) for share in (0.0, 0.1, 1.0))
    assert not none.drop.any()
    assert all_.drop.all()
    assert some.drop.any()
    for name in FIELDS[:4]:
        assert torch.equal(getattr(none, name), getattr(all_, name))


def test_distributions():
    drawn = [draw(0, step, 2000, **{**HOW, "shape": (1, 2, 2), "dropout": 0.1}) for step in (0, 1)]
    timestep, posterior, noise, drop = (
        torch.cat([getattr(d, name) for d in drawn]).flatten().numpy() for name in FIELDS[1:]
    )
    assert timestep.min() < 5
    assert timestep.max() > 994
    assert timestep.max() < 1000
    assert stats.kstest(timestep / 1000, "uniform").pvalue > 1e-3
    assert stats.kstest(posterior, "norm").pvalue > 1e-3
    assert stats.kstest(noise, "norm").pvalue > 1e-3
    assert stats.binomtest(int(drop.sum()), len(drop), 0.1).pvalue > 1e-3


def test_timesteps_of_a_shorter_process():
    drawn = draw(0, 0, 500, **{**HOW, "timesteps": whole(4)})
    assert set(drawn.timestep.tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("one", "other"),
    [((0, 1), (1, 0)), ((0, 0, 1), (0, 1, 0)), ((1, 1, 0), (1, 1, 1)), ((0, 1, 12), (0, 11, 2))],
)
def test_different_tuples_give_different_streams(one, other):
    numbers = [torch.randn(100, generator=generator(*keys)) for keys in (one, other)]
    assert torch.corrcoef(torch.stack(numbers))[0, 1].abs() < 0.4
