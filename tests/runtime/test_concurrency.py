"""A network with a schedule, called by several threads, or within another of its calls."""

import asyncio
import copy
import os
import pickle
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import diffusers
import pytest
import torch
from small_models import SD3, DiT, Flux, PixArt, UViT, close, families, filled, mixed, seeded

from accelkit.backbones import backbone_of
from accelkit.errors import AccelkitError
from accelkit.runtime.switch import enable
from accelkit.runtime.taps import Taps

THREADS, CALLS = 4, 12


@pytest.fixture(autouse=True)
def switching():
    """Makes threads take turns every few operations rather than every 5 ms."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


class UNet(DiT):
    """A conditional UNet; its counted parts are three attentions and the middle block."""

    schedule, depths = "4@0.3,2@0.6,1@1", {100: 4, 500: 2, 900: 1}

    def make(self):
        return filled(
            diffusers.UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(8, 16),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                layers_per_block=1,
                cross_attention_dim=16,
                norm_num_groups=4,
                attention_head_dim=8,
            )
        )

    def call(self, timestep):
        return {
            "sample": seeded(2, 4, 8, 8),
            "timestep": torch.tensor(timestep),
            "encoder_hidden_states": seeded(2, 5, 16),
        }


kernels = pytest.mark.parametrize("kernels", ["auto", "off"])


@torch.no_grad()
def one_after_the_other(family, kernels):
    model = family.make()
    enable(model, family.schedule, kernels=kernels)
    found = {t: model(**family.call(t)).sample for t in family.depths}
    assert (found[100] - found[900]).abs().max() > 1e-4
    return model, found


def in_threads(work):
    """What ``work`` returns for each number, run in one thread per number."""
    begin = threading.Barrier(THREADS)

    def run(number):
        begin.wait()
        return work(number)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(run, range(THREADS)))


@families(SD3, Flux, DiT, UViT, PixArt, UNet)
@kernels
def test_each_call_is_as_deep_as_its_own_timestep(family, kernels):
    model, expected = one_after_the_other(family, kernels)
    moments = list(family.depths)

    @torch.no_grad()
    def work(number):
        timestep = moments[number % len(moments)]
        call = family.call(timestep)
        return all(torch.equal(model(**call).sample, expected[timestep]) for _ in range(CALLS))

    assert all(in_threads(work))


@families(SD3, DiT, UViT)
@kernels
def test_batches_of_mixed_depths(family, kernels):
    model = family.make()
    enable(model, family.schedule, kernels=kernels)
    calls = [mixed(family, list(torch.tensor([100, 500, 900]).roll(n))) for n in range(THREADS)]

    @torch.no_grad()
    def work(number):
        return [model(**calls[number]).sample for _ in range(5)]

    expected = [work(number)[0] for number in range(THREADS)]
    for found, one in zip(in_threads(work), expected, strict=True):
        assert all(torch.equal(each, one) for each in found)


@families(SD3, DiT)
def test_gradients_while_sampling(family):
    model = family.make()
    enable(model, family.schedule, kernels="off")
    model.enable_gradient_checkpointing()
    expected = {t: model(**family.call(t)).sample.detach() for t in family.depths}
    parameter = next(p for p in model.parameters() if p.requires_grad)

    def gradient(timestep):
        return torch.autograd.grad(model(**family.call(timestep)).sample.sum(), parameter)[0]

    gradients = {t: gradient(t) for t in family.depths}

    def work(number):
        timestep = list(family.depths)[number % 3]
        if number % 2:
            return all(torch.equal(gradient(timestep), gradients[timestep]) for _ in range(5))
        with torch.no_grad():
            call = family.call(timestep)
            return all(torch.equal(model(**call).sample, expected[timestep]) for _ in range(CALLS))

    assert all(in_threads(work))


@families(DiT, UViT, PixArt)
def test_a_model_saved_while_it_is_called(family):
    model, expected = one_after_the_other(family, "auto")
    state = {name: value.clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def work(number):
        if number == 0:
            saved = [model.state_dict() for _ in range(8)]
            return all(torch.equal(each[name], state[name]) for each in saved for name in state)
        call = family.call(500)
        return all(torch.equal(model(**call).sample, expected[500]) for _ in range(CALLS))

    assert all(in_threads(work))


@families(SD3, DiT, UViT)
@kernels
def test_a_model_copied_and_pickled_while_it_is_called(family, kernels):
    model, expected = one_after_the_other(family, kernels)

    @torch.no_grad()
    def work(number):
        if number < 2:
            return [copy.deepcopy(model) if number else pickle.dumps(model) for _ in range(3)]
        call = family.call(500)
        return all(torch.equal(model(**call).sample, expected[500]) for _ in range(CALLS))

    pickled, copied, *right = in_threads(work)
    assert all(right)
    for twin in (copied[-1], pickle.loads(pickled[-1])):
        with torch.no_grad():
            for timestep, sample in expected.items():
                assert torch.equal(twin(**family.call(timestep)).sample, sample)
            for parameter in twin.parameters():
                parameter.mul_(1.1)
            for timestep, sample in expected.items():
                assert not torch.equal(twin(**family.call(timestep)).sample, sample)
                assert torch.equal(model(**family.call(timestep)).sample, sample)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_forked_during_a_call_can_go_on():
    family = DiT()
    model, _ = one_after_the_other(family, "auto")
    begun, end = threading.Event(), threading.Event()

    def wait(*_):
        begun.set()
        end.wait()

    handle = model.pos_embed.register_forward_pre_hook(wait)
    with torch.no_grad():
        caller = threading.Thread(target=lambda: model(**family.call(100)))
        caller.start()
        begun.wait()
        child = os.fork()
        if not child:  # the child reports by its exit status
            model.state_dict()
            os._exit(0)
        end.set()
        caller.join()
    handle.remove()
    deadline = time.monotonic() + 60
    while not (done := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < deadline:
        time.sleep(0.05)
    if not done[0]:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert done == (child, 0)


@families(SD3, DiT, UViT, Flux)
@kernels
def test_a_call_within_a_call(family, kernels):
    """As a callback makes, or a guidance that needs a second noise level in mid-call."""
    model, expected = one_after_the_other(family, kernels)
    inner = []
    block = backbone_of(model).all_blocks[0]

    def call_again(*_):
        if not inner:
            inner.append(None)
            inner[0] = model(**family.call(900)).sample

    handle = block.register_forward_hook(call_again)
    with torch.no_grad():
        outer = model(**family.call(500)).sample
    handle.remove()
    close([outer, inner[0]], [expected[500], expected[900]])


@families(SD3, DiT)
def test_a_backward_within_a_call(family):
    """A checkpointed block is recomputed at its own call's depth, whatever call is under way."""
    model = family.make()
    enable(model, family.schedule, kernels="off")
    model.enable_gradient_checkpointing()
    middle = backbone_of(model).blocks[1]
    parameters = [p for p in backbone_of(model).blocks[3].parameters() if p.requires_grad]

    def gradients(loss):
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    def loss(timestep):
        return model(**family.call(timestep)).sample.sum()

    expected = gradients(loss(100))
    pending, found = loss(100), []
    handle = middle.register_forward_pre_hook(
        lambda *_: (
            None if found else found.extend([None]) or found.__setitem__(0, gradients(pending))
        )
    )
    loss(900)
    handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(found[0], expected, strict=True) if b is not None)


@families(SD3, DiT, UViT)
@kernels
def test_a_call_that_fails_leaves_nothing(family, kernels):
    model, expected = one_after_the_other(family, kernels)
    block = backbone_of(model).all_blocks[1]

    def fail(*_):
        raise KeyError("in mid-call")

    handle = block.register_forward_hook(fail)
    with torch.no_grad(), pytest.raises(KeyError, match="in mid-call"):
        model(**family.call(900))
    handle.remove()
    with torch.no_grad():
        close([model(**family.call(t)).sample for t in expected], expected.values())
    with pytest.raises(AccelkitError, match="no call of its model is under way"):
        backbone_of(model).blocks[-1](seeded(2, 16, 16))


def test_generators_and_tasks_take_turns():
    """Sampling loops that pause half-way and go on after others."""
    family = SD3()
    model, expected = one_after_the_other(family, "auto")

    def loop(order):
        for timestep in order:
            with torch.no_grad():  # not around the yield, or it would reach the caller
                sample = model(**family.call(timestep)).sample
            yield timestep, sample

    loops = [loop(order) for order in ([900, 500, 100], [100, 900, 500], [500, 100, 900])]
    found = [next(each) for _ in range(2) for each in loops]
    loops.pop(0).close()
    found += [next(each) for each in loops]

    async def task(order):
        for step in loop(order):
            found.append(step)
            await asyncio.sleep(0)
            found.append(await asyncio.to_thread(lambda: next(loop([900]))))

    async def tasks():
        await asyncio.gather(task([900, 500, 100]), task([100, 900, 500]))

    asyncio.run(tasks())
    assert len(found) == 8 + 12
    assert all(torch.equal(sample, expected[timestep]) for timestep, sample in found)


def test_every_thread_has_its_own_taps():
    family = DiT()
    model = family.make()
    with enable(model, family.schedule, kernels="off") as enabled, Taps(enabled) as taps:

        def tapped(timestep):
            model(**family.call(timestep))
            return [(tap.depth, tap.output.detach()) for tap in taps.pop()]

        expected = {t: tapped(t) for t in family.depths}

        def work(number):
            timestep = list(family.depths)[number % 3]
            for _ in range(5):
                for found, wanted in zip(tapped(timestep), expected[timestep], strict=True):
                    assert found[0] == wanted[0]
                    assert torch.equal(found[1], wanted[1])

        in_threads(work)


def test_compiled_each_thread_has_the_graph_of_its_own_depth():
    """Outputs are compared, not graphs: their number depends on how threads race."""
    family = DiT()
    torch._dynamo.reset()
    model = family.make()
    model.transformer_blocks = model.transformer_blocks[:2]
    enable(model, "2@0.5,1@1", kernels="off")
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        expected = {t: compiled(**family.call(t)).sample for t in (100, 900)}
    assert not torch.equal(expected[100], expected[900])

    @torch.no_grad()
    def work(number):
        timestep = (100, 900)[number % 2]
        call = family.call(timestep)
        return all(torch.equal(compiled(**call).sample, expected[timestep]) for _ in range(CALLS))

    assert all(in_threads(work))
    torch._dynamo.reset()


def test_runs_of_several_threads_by_their_own_tables():
    """Threads with their own schedulers and labels, like several pipelines that share a network."""
    family = DiT()
    model = family.make()
    enable(model, "full")

    @torch.no_grad()
    def work(number):
        scheduler = diffusers.DDIMScheduler()
        scheduler.set_timesteps(6 + number)
        x, labels = seeded(2, 4, 8, 8), torch.tensor([number, 9])
        for t in scheduler.timesteps:
            noise = model(x, timestep=t.expand(2), class_labels=labels).sample[:, :4]
            x = scheduler.step(noise, t, x).prev_sample
        return x

    expected = [work(number) for number in range(THREADS)]
    for _ in range(3):
        assert all(map(torch.equal, in_threads(work), expected))
