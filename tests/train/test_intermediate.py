"""Supervising all parts at once: targets in closed form, and the loop against a plain one."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import DDIMScheduler, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler

from accelkit.errors import AccelkitError
from accelkit.noise.axis import NoiseAxis
from accelkit.noise.forward import DiscreteProcess, FlowProcess, VPSDEProcess, forward_process
from accelkit.noise.vp_sde import VPSDEScheduler
from accelkit.runtime.switch import enabled_on
from accelkit.runtime.taps import Tap
from accelkit.schedule import Schedule
from accelkit.subject import Subject
from accelkit.train.config import TrainConfig
from accelkit.train.draws import draw
from accelkit.train.dvd import Supervision, intermediate_target
from accelkit.train.loop import Watch, make_accelerator, train
from accelkit.train.objectives import denoising_loss
from accelkit.train.rundir import RunDirectory

ABAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
DISCRETE = DiscreteProcess(BETAS)
HERE = torch.tensor([0.0])


def supervision(schedule="dvd-2p", scheduler=None, match="nearest", layers=12):
    scheduler = scheduler or DDIMScheduler()
    axis, process = NoiseAxis.of(scheduler), forward_process(scheduler)
    return Supervision(Schedule.parse(schedule, layers), axis, process, match)


def pairs(count=5, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(2, count, 3, 2, 2, generator=rng)


def numbers(*values):
    return [torch.tensor([v]) for v in values]


# Targets


@pytest.mark.parametrize(
    ("t", "s", "k", "m", "of_eps"),
    [
        (250, 750, 0.665, 0.307, 0.693),
        (100, 600, 0.786, 0.663, 0.337),
        (0, 500, 0.721, 0.950, 0.050),
        (499, 999, 0.274, 0.040, 0.960),
        (499, 500, 0.001, 0.000, 1.0),
    ],
)
def test_target_of_noise_prediction(t, s, k, m, of_eps):
    """The paper's k x_0 + (1 - m) eps, for timesteps typed in with their k and m."""
    assert k == pytest.approx(math.sqrt(ABAR[t]) - math.sqrt(ABAR[s]), abs=6e-4)
    assert m == pytest.approx(math.sqrt(1 - ABAR[s]) - math.sqrt(1 - ABAR[t]), abs=6e-4)
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    target = intermediate_target(DISCRETE, one, zero, *numbers(t, s))
    assert target.item() == pytest.approx(k, abs=6e-4)
    target = intermediate_target(DISCRETE, zero, one, *numbers(t, s))
    assert target.item() == pytest.approx(of_eps, abs=6e-4)


@pytest.mark.parametrize(("t", "s"), [(100.0, 900.0), (0.0, 500.0), (499.0, 500.0)])
def test_target_on_the_straight_path(t, s):
    x0, eps = pairs()
    many = [torch.full((5,), time) for time in (t, s)]
    target = intermediate_target(FlowProcess(), x0, eps, *many)
    torch.testing.assert_close(target, (1 - (s - t) / 1000) * (eps - x0))


@pytest.mark.parametrize(
    "process",
    [
        DISCRETE,
        DiscreteProcess(BETAS, predicts="v_prediction"),
        DiscreteProcess(BETAS, predicts="sample"),
        FlowProcess(),
        VPSDEProcess(),
    ],
    ids=["epsilon", "v", "x0", "flow", "sde"],
)
def test_target_is_what_a_part_of_unit_gradient_returns(process):
    """Such a part, right at x_s, is x -> x + (y - x_s)."""
    x0, eps = pairs()
    t, s = torch.tensor([0, 3, 200, 499, 10]), torch.tensor([500, 999, 700, 500, 750])
    offset = process.target(x0, eps, s) - process.add_noise(x0, eps, s)
    expected = process.add_noise(x0, eps, t) + offset
    torch.testing.assert_close(intermediate_target(process, x0, eps, t, s), expected)


# Which noise level it is taken from


@pytest.mark.parametrize(
    ("match", "schedule", "t", "s"),
    [
        ("nearest", "dvd-2p", [0, 250, 499], [500, 500, 500]),
        ("nearest", "dvd-2p:threshold=0.6", [0, 250, 599], [600, 600, 600]),
        ("relative", "dvd-2p", [0, 100, 250, 499], [500, 600, 750, 999]),
        ("relative", "dvd-2p:threshold=0.8", [0, 4, 400, 799], [800, 801, 900, 999]),
        ("middle", "dvd-2p", [0, 250, 499], [750, 750, 750]),
    ],
)
def test_matched_timesteps(match, schedule, t, s):
    t = torch.tensor(t)
    matched = supervision(schedule, match=match).matched(6, t, torch.zeros(len(t)))
    assert matched.tolist() == s
    assert matched.dtype == torch.int64


@pytest.mark.parametrize(
    ("match", "expected"),
    [  # parts 3, 5 and 8 of t = 0, 250, 499, 500 (not of the third), 749, 750
        ("nearest", {3: [875] * 6, 5: [750] * 5, 8: [500] * 3}),
        ("relative", {3: [875, 937, 999, 875, 999, 875], 5: [750, 812, 874, 750, 874]}),
        ("middle", {3: [937] * 6, 5: [812] * 5, 8: [625] * 3}),
    ],
)
def test_matched_timesteps_of_four_parts(match, expected):
    own = supervision("dvd-4p", match=match)
    for depth, s in expected.items():
        t = torch.tensor([0, 250, 499, 500, 749, 750][: len(s)])
        assert own.matched(depth, t, torch.zeros(len(t))).tolist() == s


def test_random_timesteps_fill_the_interval():
    own = supervision("dvd-3p", match="random")
    place = torch.arange(10_000) / 10_000
    matched = own.matched(8, torch.zeros(10_000, dtype=torch.int64), place)
    assert matched.unique().tolist() == list(range(500, 750))
    assert {39, 40, 41} >= set(matched.bincount()[500:].tolist())  # places are float32
    assert own.matched(4, numbers(0)[0], torch.tensor([0.9999999])).item() == 999


@pytest.mark.parametrize("match", ["nearest", "relative", "middle", "random"])
@pytest.mark.parametrize(
    ("scheduler", "parts"),
    [
        (DDIMScheduler(beta_schedule="scaled_linear"), "dvd-2p"),
        (DDIMScheduler(beta_schedule="squaredcos_cap_v2"), "dvd-4p"),
        (DDIMScheduler(num_train_timesteps=100, beta_start=1e-3, beta_end=0.2), "dvd-4p"),
        (FlowMatchEulerDiscreteScheduler(), "dvd-4p"),
        (FlowMatchEulerDiscreteScheduler(shift=3.0), "dvd-4p"),
        (VPSDEScheduler(), "dvd-4p"),
    ],
    ids=["scaled", "cosine", "100", "flow", "shifted", "sde"],
)
def test_matched_noise_levels_are_the_parts_own_under_any_process(scheduler, parts, match):
    schedule = Schedule.parse(parts, 12)
    own, axis = supervision(parts, scheduler, match), NoiseAxis.of(scheduler)
    drawn = own.process.draw(400, torch.Generator().manual_seed(0))
    depth_of = np.array([schedule.depth_at(level) for level in axis.levels(drawn)])
    place = torch.rand(400, generator=torch.Generator().manual_seed(1))
    for depth in schedule.depths[:-1]:
        deeper = torch.from_numpy(depth_of > depth)
        assert deeper.any()
        matched = own.matched(depth, drawn[deeper], place[deeper])
        assert matched.dtype == drawn.dtype
        above = matched if own.process.whole else matched + 1e-3  # an edge is rounded to float32
        assert {schedule.depth_at(level) for level in axis.levels(above)} == {depth}
        if match == "nearest":
            (first,) = matched.unique().tolist()
            step = 1 if own.process.whole else 1e-2
            assert schedule.depth_at(axis.level(first - step)) > depth


def test_nearest_target_is_continuous_where_a_part_begins():
    """With every other match it jumps there."""
    x0, eps = pairs(1)
    jumps = {}
    for match in ("nearest", "relative", "middle"):
        own = supervision("dvd-2p", FlowMatchEulerDiscreteScheduler(), match)
        edge = own.bounds[1].item()
        (t,) = numbers(edge - 1e-3)
        s = own.matched(6, t, HERE)
        target = intermediate_target(own.process, x0, eps, t, s)
        jumps[match] = (target - (eps - x0)).abs().max().item()
    assert jumps["nearest"] < 1e-4
    assert min(jumps["relative"], jumps["middle"]) > 0.1


@pytest.mark.parametrize("text", ["full", "uniform:6", "6@0.5,12@1", "12@0.3,6@0.6,8@1"])
def test_a_depth_that_does_not_fall(text):
    with pytest.raises(AccelkitError, match="at least two depths that fall") as caught:
        supervision(text)
    assert "\n" not in str(caught.value)


def test_a_part_without_a_timestep():
    # Stable Diffusion's, which ends at level 0.73
    latents = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    with pytest.raises(AccelkitError, match=r"levels 0\.75 to 1, which no timestep") as caught:
        supervision("dvd-3p", latents)
    assert "\n" not in str(caught.value)


# Losses


def test_a_sample_loses_the_sum_over_the_parts_that_it_passes():
    own, (x0, eps) = supervision("dvd-3p"), pairs()
    t = torch.tensor([900, 0, 600, 400, 749])  # runs 4, 12, 8, 12 and 8 blocks
    generator = torch.Generator().manual_seed(3)
    taps = [
        Tap(4, torch.tensor([3, 1, 4, 2]), torch.randn(4, 6, 2, 2, generator=generator)),
        Tap(8, torch.tensor([3, 1]), torch.randn(2, 6, 2, 2, generator=generator)),
    ]
    for tap in taps:
        tap.output.requires_grad_()
    losses = own.losses(taps, x0, eps, t, torch.zeros(5))
    expected = [0.0] * 5
    for tap in taps:
        first = {4: 750, 8: 500}[tap.depth]
        for row, output in zip(tap.rows.tolist(), tap.output, strict=True):
            k = math.sqrt(ABAR[t[row]]) - math.sqrt(ABAR[first])
            m = math.sqrt(1 - ABAR[first]) - math.sqrt(1 - ABAR[t[row]])
            target = k * x0[row] + (1 - m) * eps[row]
            expected[row] += (output[:3] - target).square().mean().item()
    assert losses.tolist() == pytest.approx(expected, rel=1e-4)
    assert losses[0] == 0
    losses.sum().backward()
    for tap in taps:  # the second half of the channels is a variance
        assert tap.output.grad[:, :3].all()
        assert not tap.output.grad[:, 3:].any()


def test_half_precision_predictions_lose_float32():
    own, (x0, eps) = supervision(), pairs(2)
    t = torch.tensor([0, 100])
    output = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    half = Tap(6, torch.arange(2), output.bfloat16())
    losses = own.losses([half], x0, eps, t, torch.zeros(2))
    assert losses.dtype == torch.float32
    full = own.losses([Tap(6, torch.arange(2), output.bfloat16().float())], x0, eps, t, t)
    assert torch.equal(losses, full)


def test_no_taps_lose_nothing():
    x0, eps = pairs()
    losses = supervision().losses([], x0, eps, torch.full((5,), 900), torch.zeros(5))
    assert torch.equal(losses, torch.zeros(5))


# The loop

LAYERS, CLASSES, SHAPE = 4, 10, (4, 4, 4)
PARTS = "4@0.5,3@0.75,1@1"
CONFIG = TrainConfig(
    steps=1,
    batch_size=12,
    learning_rate=3e-3,
    ema_decay=0.0,
    loss_weight="ramp",
    loss_weight_until=1.0,
    freeze_time_embedder=False,
    intermediate_weight=0.7,
    seed=2,
)


class Toy:
    """Eleven samples of four values each."""

    shape = SHAPE
    labels = torch.arange(11) % CLASSES

    def __init__(self):
        self.mean = torch.randn(11, *SHAPE, generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return len(self.mean)

    def sample(self, indices, noise):
        return self.mean[indices] + 0.1 * noise


def build(channels=8):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=channels,
            num_layers=LAYERS,
            sample_size=4,
            patch_size=2,
            num_embeds_ada_norm=CLASSES,
        )
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    first, *others = (block.norm1.emb for block in model.transformer_blocks)
    for other in others:
        other.load_state_dict(first.state_dict())
    return model.eval()


@pytest.fixture(autouse=True)
def one_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    for state in (GradientState, AcceleratorState, PartialState):
        state._reset_state()


def fit(path, config=CONFIG, schedule=PARTS, *, scheduler=None, channels=8, **options):
    """Train in ``path``, or go on; return the model and what each step reported."""
    model, run, reports = build(channels), RunDirectory(path), []
    stop = options.pop("stop", 0)

    def on_step(progress):
        reports.append(progress)
        if progress.step == stop:
            raise KeyboardInterrupt

    AcceleratorState._reset_state()
    try:
        accelerator = make_accelerator(config)
        run.open({}, resume=(path / "run.json").exists(), overwrite=False, free=frozenset())
        train(
            Subject.of(model, scheduler or DDIMScheduler()),
            Schedule.parse(schedule, LAYERS),
            Toy(),
            config,
            run,
            accelerator,
            Watch(on_step=on_step, **options),
        )
    finally:
        run.close()
    return model, reports


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Of one step as configured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        return fit(tmp_path_factory.mktemp("runs") / "plain")[1][0]


def by_hand(config, scheduler, first, channels=8):
    """Loss and gradients of the first step, each sample through networks cut to each of its exits.

    ``first`` gives the first timestep of a part by its depth.
    """
    model, process, schedule = build(channels), forward_process(scheduler), Schedule.parse(PARTS, 4)
    blocks, shared = model.transformer_blocks, (model.proj_out_1, model.proj_out_2)
    heads = dict.fromkeys((1, 3, 4), shared)
    if config.intermediate_head == "own":
        heads = {depth: copy.deepcopy(shared) for depth in (1, 3)} | {4: shared}
    for block in blocks:
        block.norm1.emb = blocks[0].norm1.emb
    blocks[0].norm1.emb.class_embedder.dropout_prob = 0.0
    batch = draw(
        config.seed,
        0,
        config.batch_size,
        size=11,
        shape=SHAPE,
        timesteps=process.draw,
        dropout=config.label_dropout,
    )
    x0 = Toy().sample(batch.rows, batch.posterior)
    labels = torch.where(batch.drop, CLASSES, Toy.labels[batch.rows])
    levels = NoiseAxis.of(scheduler).levels(batch.timestep)
    total = 0.0
    for row, level in enumerate(levels):
        one = slice(row, row + 1)
        x, eps, t = x0[one], batch.noise[one], batch.timestep[one]
        xt = process.add_noise(x, eps, t)
        loss = 0.0
        own = schedule.depth_at(level)
        for depth in (1, 3, 4):
            if depth > own:
                continue
            model.transformer_blocks = blocks[:depth]
            model.proj_out_1, model.proj_out_2 = shared if depth == own else heads[depth]
            output = model(xt, t, labels[one]).sample
            if depth == own:
                loss = loss + denoising_loss(process, output, x, eps, xt, t)
            else:
                s = torch.full_like(t, first[depth])
                target = intermediate_target(process, x, eps, t, s)
                loss = loss + config.intermediate_weight * (output[:, :4] - target).square().mean()
        total = total + (0.1 + 0.9 * level) * loss.sum() / config.batch_size
    model.transformer_blocks, (model.proj_out_1, model.proj_out_2) = blocks, shared
    total.backward()
    parameters = dict.fromkeys(p for m in (model, *sum(heads.values(), ())) for p in m.parameters())
    gradients = [p.grad for p in parameters if p.grad is not None]
    return total.item(), torch.cat([g.flatten() for g in gradients]).norm().item()


def test_a_step_against_a_plain_one(report):
    """Loss and gradient norm: the learned variance at a sample's own exit alone, lambda on all."""
    loss, norm = by_hand(CONFIG, DDIMScheduler(), {1: 750, 3: 500})
    assert report.loss == pytest.approx(loss, rel=1e-5)
    assert report.grad_norm == pytest.approx(norm, rel=1e-4)


def test_a_step_with_a_head_for_each_exit_against_a_plain_one(tmp_path, report):
    config = replace(CONFIG, intermediate_head="own")
    _, (own,) = fit(tmp_path, config)
    loss, norm = by_hand(config, DDIMScheduler(), {1: 750, 3: 500})
    assert own.loss == pytest.approx(loss, rel=1e-5) == report.loss
    assert own.grad_norm == pytest.approx(norm, rel=1e-4)
    assert abs(own.grad_norm - report.grad_norm) > 1e-3 * report.grad_norm


def test_a_head_that_is_not_known_is_refused_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr("accelkit.backbones.dit.DiT.head", ("last_layer",))
    with pytest.raises(AccelkitError, match="head of a DiTTransformer2DModel is not known"):
        fit(tmp_path, replace(CONFIG, intermediate_head="own"))
    assert not list(tmp_path.glob("checkpoints/*"))


def test_a_step_of_flow_matching_against_a_plain_one(tmp_path):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    # s with log-SNR 2 log((1 - s) / s) as at indices 750 and 500 of the linear betas
    snr = [ABAR[index] / (1 - ABAR[index]) for index in (750, 500)]
    first = {depth: 1000 / (1 + math.sqrt(r)) for depth, r in zip((1, 3), snr, strict=True)}
    _, (report,) = fit(tmp_path, scheduler=scheduler, channels=4)
    loss, norm = by_hand(CONFIG, scheduler, first, channels=4)
    assert report.loss == pytest.approx(loss, rel=1e-4)
    assert report.grad_norm == pytest.approx(norm, rel=1e-3)


@pytest.mark.parametrize(
    "change",
    [{"gradient_accumulation": 3}, {"gradient_checkpointing": True}],
    ids=["accumulated", "recomputed"],
)
def test_the_same_step_otherwise(tmp_path, report, change):
    _, (other,) = fit(tmp_path, replace(CONFIG, **change))
    assert other.loss == pytest.approx(report.loss, rel=1e-5)
    assert other.grad_norm == pytest.approx(report.grad_norm, rel=1e-4)


def test_bfloat16_trains(tmp_path, report):
    _, (half,) = fit(tmp_path, replace(CONFIG, mixed_precision="bf16"))
    assert half.loss == pytest.approx(report.loss, rel=0.05)
    assert half.loss != report.loss


def test_adapters_train_with_it(tmp_path, report):
    pytest.importorskip("peft")
    config = replace(CONFIG, lora_rank=2, freeze_time_embedder=True)
    _, (adapted,) = fit(tmp_path, config)
    assert adapted.loss == pytest.approx(report.loss, rel=1e-5)  # adapters begin with nothing


def test_matches_differ(tmp_path, report):
    _, (relative,) = fit(tmp_path, replace(CONFIG, intermediate_match="relative"))
    assert relative.loss != report.loss


def test_without_a_weight_nothing_is_tapped(tmp_path, monkeypatch, report):
    def fail(*_):
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr("accelkit.train.loop.Taps", fail)
        _, (off,) = fit(tmp_path, replace(CONFIG, intermediate_weight=0.0))
    assert off.loss < report.loss


@pytest.mark.parametrize("head", ["shared", "own"])
def test_resumed_the_weights_are_the_same(tmp_path, head):
    config = replace(CONFIG, steps=3, intermediate_match="random", intermediate_head=head)
    whole, _ = fit(tmp_path / "whole", config)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "killed", config, checkpoint_every=1, stop=2)
    resumed, reports = fit(tmp_path / "killed", config)
    assert [r.step for r in reports] == [2, 3]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert whole.state_dict().keys() == build().state_dict().keys()


def test_the_model_is_left_bare(tmp_path):
    model, _ = fit(tmp_path)
    assert enabled_on(model) is None
    assert not [n for n, m in model.named_modules() if "_diffusers_hook" in vars(m)]


def test_a_schedule_without_parts_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(AccelkitError, match="no earlier exit to supervise"):
        fit(tmp_path, schedule="full")
