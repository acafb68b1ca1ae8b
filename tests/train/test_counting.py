"""Every counted step is one update of the weights, whatever the launcher's settings."""

import functools
import signal
from dataclasses import replace

import accelerate.accelerator
import pytest
import torch
import toy_run
from accelerate import Accelerator
from by_hand import train_by_hand
from torch.optim.optimizer import register_optimizer_step_post_hook
from toy_run import (
    CONFIG,
    RAGGED,
    SHORT,
    Toy,
    assert_close,
    assert_same,
    build,
    fit,
    latest,
    signalled,
)

from accelkit.errors import AccelkitError, Stopped
from accelkit.files.writing import read_record, write_record
from accelkit.train.launch import check, make_accelerator
from accelkit.train.rundir import RunDirectory

pytestmark = pytest.mark.usefixtures("one_cpu")

CLIPPED = replace(CONFIG, max_grad_norm=0.1)  # every step's norm is above it


@pytest.fixture(scope="module")
def expected():
    """Results of a hand-written loop; read them, do not change them."""
    return train_by_hand(CLIPPED, RAGGED)


@pytest.fixture
def updates():
    """Counts the optimiser's updates as torch sees them, in a list."""
    seen = []
    handle = register_optimizer_step_post_hook(lambda *args: seen.append(len(seen)))
    yield seen
    handle.remove()


def agree(seen, model, updates, expected, loss=1e-5, norm=1e-4, weight=1e-4):
    assert [p.step for p in seen] == list(range(1, CONFIG.steps + 1))
    assert len(updates) == expected.updates == CONFIG.steps
    assert [p.loss for p in seen] == pytest.approx(expected.losses, rel=loss)
    assert [p.grad_norm for p in seen] == pytest.approx(expected.norms, rel=norm)
    # a step reports the rate that the next one has
    assert [p.learning_rate for p in seen] == pytest.approx(expected.rates[1:])
    assert_close(model, expected.model, atol=weight)


# The environment


HARMLESS = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_GRADIENT_CLIPPING": "0.01",
    "ACCELERATE_DOWNCAST_BF16": "true",
    "ACCELERATE_SPLIT_BATCHES": "true",
    "ACCELERATE_DYNAMO_BACKEND": "no",
    "ACCELERATE_USE_FSDP": "false",
    "FSDP_VERSION": "2",
    "FSDP_OFFLOAD_PARAMS": "true",
    "PARALLELISM_CONFIG_TP_SIZE": "2",
}


@pytest.mark.parametrize(
    ("variables", "parts"),
    [({}, 1), (HARMLESS, 1), (HARMLESS, 2), ({"ACCELERATE_MIXED_PRECISION": "bf16"}, 1)],
    ids=["none", "all", "all in parts", "precision"],
)
def test_the_launchers_settings_change_no_step(
    tmp_path, monkeypatch, expected, updates, variables, parts
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    seen = []
    config = replace(CLIPPED, gradient_accumulation=parts)
    agree(seen, fit(tmp_path, config, on_step=seen.append), updates, expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true"),
        ("ACCELERATE_USE_FSDP", "true"),
        ("ACCELERATE_USE_FSDP", "1"),
        ("ACCELERATE_USE_MEGATRON_LM", "true"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true"),
        ("ACCELERATE_FP8_BACKEND", "AO"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR"),
    ],
)
def test_what_would_change_a_step_is_refused(tmp_path, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(AccelkitError, match=f"{name}={value} .*; launch without --.*unset {name}$"):
        fit(tmp_path, SHORT)
    assert not (tmp_path / "run.json").exists()


def test_a_process_that_began_in_another_precision_is_refused():
    Accelerator(mixed_precision="bf16")
    with pytest.raises(AccelkitError, match=r"cannot set up the run: .*already been initialized"):
        make_accelerator(CONFIG)


def test_an_accelerator_that_accumulates_by_itself_is_refused():
    with pytest.raises(AccelkitError, match=r"divides every gradient .* 4; make it with 1"):
        check(Accelerator(gradient_accumulation_steps=4))


def test_fp16_without_a_loss_scaler_is_refused(tmp_path):
    """On a CPU accelerate would run it in float32, under the name of fp16."""
    with pytest.raises(AccelkitError, match=r"no training in fp16 on cpu; .* bf16 or no"):
        fit(tmp_path, replace(SHORT, mixed_precision="fp16"))


def test_another_loop_that_is_accumulating_stops_no_step(tmp_path, uninterrupted, updates):
    """Accelerate has one flag for all loops of a process; without it, optimisers do nothing."""
    Accelerator().sync_gradients = False
    assert_same(fit(tmp_path), uninterrupted)
    assert len(updates) == CONFIG.steps


def test_earlier_gradients_do_not_enter_the_first_step(tmp_path, uninterrupted):
    model = build()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert_same(fit(tmp_path, model=model), uninterrupted)
    assert all(parameter.grad is None for parameter in model.parameters())


def dropping():
    model = build()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    return model


def test_the_networks_own_draws_follow_from_the_step(tmp_path, uninterrupted):
    """Its dropout does not depend on the caller's random state or on earlier steps."""
    torch.manual_seed(1)
    whole = fit(tmp_path / "whole", model=dropping())
    assert not torch.equal(whole.proj_out_2.weight, uninterrupted.proj_out_2.weight)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    with pytest.raises(Stopped):
        fit(tmp_path / "run", model=dropping(), samples=signalled(signal.SIGTERM, at=3))
    assert torch.equal(torch.get_rng_state(), state)
    folder = RunDirectory(tmp_path / "run").latest()[1]
    (folder / "random_states_0.pkl").unlink()
    listed = read_record(folder / "checksums.json")["files"]
    del listed["random_states_0.pkl"]
    write_record(folder / "checksums.json", {"files": listed})
    assert_same(fit(tmp_path / "run", model=dropping()), whole)


# Loss scaling

HALF = replace(CLIPPED, mixed_precision="fp16")
START, LIMIT, GROWTH = 2.0**15, 2.0**12, 3


def loss_scaler():
    """Overflows in the first step, and whenever three steps in a row have let it grow."""
    return torch.amp.GradScaler("cpu", init_scale=START, growth_interval=GROWTH)


def overflowing(scaler):
    """A network with a gradient that is infinite above the same scale on every machine."""
    model = build()
    model.proj_out_2.weight.register_hook(
        lambda gradient: gradient * torch.inf if scaler().get_scale() > LIMIT else gradient
    )
    return model


@pytest.fixture
def scalers(monkeypatch):
    """Gives runs a loss scaler on the CPU, as accelerate does on a GPU; lists the scalers."""
    used = []

    def make(config, **options):
        accelerator = make_accelerator(config, **options)
        accelerator.scaler, accelerator.native_amp = loss_scaler(), True
        used.append(accelerator.scaler)
        return accelerator

    monkeypatch.setattr(toy_run, "make_accelerator", make)
    return used


@pytest.fixture
def float32(monkeypatch):
    """Lets a run scale its loss and compute in float32 all the same."""
    off = functools.partial(torch.autocast, "cpu", torch.float16, enabled=False)
    monkeypatch.setattr(
        accelerate.accelerator, "get_mixed_precision_context_manager", lambda *args: off()
    )


def test_overflowing_steps_are_run_again(tmp_path, scalers, updates):
    seen, samples, ours = [], Toy(), loss_scaler()
    expected = train_by_hand(HALF, RAGGED, overflowing(lambda: ours), ours)
    updates.clear()
    model = overflowing(lambda: scalers[0])
    fit(tmp_path, HALF, model=model, on_step=seen.append, samples=samples)
    # down to the limit in the first step, and once more after every third
    assert samples.calls == expected.tries == CONFIG.steps + 3 + 2
    # float16 has 11 bits: what is added up in another order differs by some 5e-4
    agree(seen, model, updates, expected, loss=5e-3, norm=5e-3, weight=1e-3)


def test_steps_that_are_run_again_are_the_same(tmp_path, scalers, float32, updates, uninterrupted):
    """A power of two rounds nothing in float32: no bit may differ from a run without a scaler."""
    samples, model = Toy(), overflowing(lambda: scalers[0])
    fit(tmp_path, replace(CONFIG, mixed_precision="fp16"), samples=samples, model=model)
    assert samples.calls == CONFIG.steps + 3 + 2
    assert len(updates) == CONFIG.steps
    assert_same(model, uninterrupted)


def test_a_run_with_skipped_steps_is_resumed_exactly(tmp_path, scalers):
    """Wherever the signal comes, for instance while the scale is lowered."""
    whole = fit(tmp_path / "whole", HALF, model=overflowing(lambda: scalers[-1]))
    for at in (2, 8):
        folder, model = tmp_path / str(at), overflowing(lambda: scalers[-1])
        with pytest.raises(Stopped):
            fit(folder, HALF, samples=signalled(signal.SIGTERM, at), model=model)
        assert latest(folder) < CONFIG.steps
        assert_same(fit(folder, HALF, model=overflowing(lambda: scalers[-1])), whole)
        assert scalers[-1].state_dict() == scalers[0].state_dict()


@pytest.mark.parametrize("scaling", [False, True])
def test_a_gradient_that_is_never_finite_ends_in_a_sentence(tmp_path, request, scaling):
    """Before it reaches the weights and the next checkpoint."""
    model, seen, spoilt = build(), [], []

    def spoil(gradient):
        if len(seen) < 2:
            return gradient
        spoilt.append(gradient)
        return gradient * torch.nan

    model.proj_out_2.weight.register_hook(spoil)
    if scaling:
        request.getfixturevalue("scalers")
    config = replace(CONFIG, mixed_precision="fp16" if scaling else "no")
    with pytest.raises(AccelkitError, match="gradient norm is nan at step 3; the checkpoint of"):
        fit(tmp_path, config, model=model, checkpoint_every=1, on_step=seen.append)
    assert len(spoilt) == (16 if scaling else 1)  # at the scales 2^15, 2^14, ... 1
    assert latest(tmp_path) == 2
    assert all(value.isfinite().all() for value in model.parameters())


def test_a_norm_that_overflows_by_itself_does_not_lower_the_scale(tmp_path, scalers):
    """Squares of gradients near 1e25 are infinite in float32, which no scaler checks."""
    model = build()
    model.proj_out_2.weight.register_hook(
        lambda gradient: torch.full_like(gradient, 1e25) * scalers[0].get_scale()
    )
    with pytest.raises(AccelkitError, match="gradient norm is inf at step 1"):
        fit(tmp_path, HALF, model=model)
    assert scalers[0].get_scale() == START
