"""What holds for every family whose blocks follow one another: a test class's common base.

A family's own test derives from :class:`Family`, builds a tiny model and its inputs, and gets the
tests below. Everything is compared with diffusers' own network, its block lists cut by hand.
"""

import copy
import inspect
import itertools
import math

import numpy as np
import pytest
import torch
from plain import enable

from accelkit.backbones import backbone_of
from accelkit.errors import AccelkitError
from accelkit.runtime.switch import disable, enabled_on

SCHEDULE = "4@0.3,3@0.6,1@1"
ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
_EDGE_LOG_SNR = [math.log(ALPHA_BAR[edge] / (1 - ALPHA_BAR[edge])) for edge in (300, 600)]


def randomized(build, std=0.2):
    """A network without a zero weight, so that every block and the exit show in the output."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=std)
    return model.eval()


def draws(seed=1):
    """``draw(*shape)`` gives normal numbers, always the same ones for a seed."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-5 * float(b.abs().max()), rtol=1e-5)


def traces(model):
    """Everything in every sub-module's ``__dict__``, one level deep."""
    return {
        name: {k: dict(v) if isinstance(v, dict) else v for k, v in vars(module).items()}
        for name, module in model.named_modules()
    }


def row(value, index):
    """One sample of an argument that has one row for each."""
    if isinstance(value, torch.Tensor):
        return value[index : index + 1]
    if isinstance(value, dict):
        return {k: row(v, index) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [row(v, index) for v in value]
    return value


def gradients(model, *calls):
    """Gradients by name of the summed losses; all forwards are run before the backward."""
    model.zero_grad(set_to_none=True)
    losses = [model(**call).sample.square().sum() for call in calls]
    sum(losses).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same_gradients(a, b):
    assert a.keys() == b.keys()
    largest = max(g.abs().max() for g in b.values())
    for name, gradient in a.items():
        torch.testing.assert_close(gradient, b[name], atol=float(5e-6 * largest), rtol=1e-3)


class Family:
    """Four counted blocks; depths 4, 3 and 1.

    Attributes:
        lists: names of the model's block lists, in the order in which they run.
        shared: names of the inputs that all samples share.
        scale: what the model's timestep is of the scheduler's.
        moments: scheduler timesteps that run 4, 3 and 1 blocks.
        timestep_weights: part of the names of the timestep embedder's weights.
    """

    lists = ("transformer_blocks",)
    shared = ()
    scale = 1.0
    moments = (100, 775, 990)
    timestep_weights = "timestep_embedder."

    def build(self):
        raise NotImplementedError

    def inputs(self, batch):
        """Keyword arguments of a call of ``batch`` samples, all but the timestep."""
        raise NotImplementedError

    def pipeline(self, model):
        """diffusers' pipeline around the network alone, and what a call of it needs besides."""
        raise NotImplementedError

    def blocks_of_step(self, depth):
        """How many blocks each of the pipeline's calls of a step runs."""
        return [depth]

    def scheduler(self):
        from diffusers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler(shift=3.0)

    def steps(self, scheduler, count):
        """Set ``count`` steps and return the timesteps at which the network is called."""
        scheduler.set_timesteps(count)
        return self.visited(scheduler)

    def visited(self, scheduler):
        return scheduler.timesteps

    def given(self, timestep):
        """What the network is given for the scheduler's timestep."""
        return timestep * self.scale

    def log_snr(self, timestep):
        return 2 * math.log((1000 - timestep) / timestep) if timestep < 1000 else -math.inf

    # --- the reference: diffusers' network, cut --------------------------------------------

    def cut(self, model, depth):
        """The network with its first ``depth`` blocks."""
        short = copy.deepcopy(model)
        for name in self.lists:
            blocks = getattr(short, name)
            kept = min(depth, len(blocks))
            setattr(short, name, blocks[:kept])
            depth -= kept
        return short

    def depth_of(self, timestep):
        depths = zip(_EDGE_LOG_SNR, (4, 3), strict=True)
        return next((d for edge, d in depths if self.log_snr(timestep) > edge), 1)

    def mixed(self, order=(2, 0, 1, 0)):
        """A call with a sample at each of these moments, and the depths that they run."""
        moments = [self.moments[i] for i in order]
        call = self.inputs(len(order)) | {"timestep": self.given(torch.tensor(moments))}
        return call, [(4, 3, 1)[i] for i in order]

    def one(self, call, index):
        return {k: v if k in self.shared else row(v, index) for k, v in call.items()}

    @torch.no_grad()
    def by_hand(self, model, call, depths):
        """Every sample alone through the network cut to its depth."""
        parts = [self.cut(model, d)(**self.one(call, i)).sample for i, d in enumerate(depths)]
        return torch.cat(parts)

    def watch(self, model):
        """A list that grows by a number whenever a block runs: how many samples it is run on."""
        seen = []
        for block in (block for name in self.lists for block in getattr(model, name)):
            first = next(block.children())  # a norm, which every block calls first and once
            first.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
        return seen

    def on(self, model, schedule=SCHEDULE):
        return enable(model, schedule, scheduler=self.scheduler())

    # --- the tests -------------------------------------------------------------------------

    @pytest.fixture
    def model(self):
        return randomized(self.build)

    def test_the_family_is_found_by_class(self, model):
        backbone = backbone_of(model)
        assert backbone.depth == 4
        assert backbone.null_class is None
        assert [len(modules) for modules in backbone.attentions()] in ([0] * 4, [1] * 4)
        every = dict(model.named_parameters())
        with backbone.training(freeze_time=True):
            frozen = {n for n, p in every.items() if not p.requires_grad}
        assert frozen == {n for n in every if self.timestep_weights in n} != set()
        assert all(p.requires_grad for p in every.values())

    def test_tokens_are_merged_where_their_order_does_not_matter(self, model):
        backbone = backbone_of(model)
        if any(backbone.attentions()):
            with self.on(model, "tome:0.3:F2") as state:
                assert state.schedule.merges
            return
        words = f"tokens cannot be merged in a {backbone.family}: .*leave tome:0.3 out"
        with pytest.raises(AccelkitError, match=words) as caught:
            self.on(model, "tome:0.3")
        assert "\n" not in str(caught.value)
        assert enabled_on(model) is None

    def test_moments_are_where_they_are_meant_to_be(self):
        assert [self.depth_of(t) for t in self.moments] == [4, 3, 1]

    @torch.no_grad()
    def test_full_hooks_nothing_and_changes_no_bit(self, model):
        call, _ = self.mixed()
        output = model(**call).sample
        with self.on(model, "full"):
            assert not any("_diffusers_hook" in vars(m) for m in model.modules())
            assert not any("forward" in vars(m) for m in model.modules())
            assert torch.equal(model(**call).sample, output)
        assert enabled_on(model) is None

    @torch.no_grad()
    def test_an_exit_is_the_network_cut_there(self, model):
        call, _ = self.mixed()
        outputs = [self.cut(model, depth)(**call).sample for depth in (1, 2, 3, 4)]
        for depth, expected in enumerate(outputs, 1):
            with self.on(model, f"uniform:{depth}"):
                assert torch.equal(model(**call).sample, expected)
        assert all(
            (a - b).abs().max() > 1e-3 * b.abs().max() for a, b in itertools.pairwise(outputs)
        )

    @torch.no_grad()
    def test_disabled_again_nothing_is_left(self, model):
        call, _ = self.mixed()
        before, keys, output = traces(model), list(model.state_dict()), model(**call).sample
        self.on(model)
        assert list(model.state_dict()) == keys
        assert not torch.equal(model(**call).sample, output)
        disable(model)
        assert traces(model) == before
        assert list(model.state_dict()) == keys
        assert torch.equal(model(**call).sample, output)

    @torch.no_grad()
    def test_rows_of_a_mixed_batch_equal_single_calls(self, model):
        call, depths = self.mixed()
        expected = self.by_hand(model, call, depths)
        with self.on(model):
            close(model(**call).sample, expected)
            for i in range(len(depths)):
                close(model(**self.one(call, i)).sample, expected[i : i + 1])

    @torch.no_grad()
    def test_a_mixed_batch_is_one_pass_that_samples_leave(self, model):
        seen = self.watch(model)
        call, _ = self.mixed()
        with self.on(model):
            model(**call)
        assert seen == [4, 3, 3, 2]

    @torch.no_grad()
    def test_both_call_styles(self, model):
        call, depths = self.mixed()
        taken = list(inspect.signature(type(model).forward).parameters.values())[1:]
        args = [call.get(parameter.name, parameter.default) for parameter in taken]
        with self.on(model):
            close(model(*args).sample, self.by_hand(model, call, depths))
            assert torch.equal(model(*args).sample, model(**call).sample)
            bare = model(**call, return_dict=False)
            assert isinstance(bare, tuple)
            assert torch.equal(bare[0], model(**call).sample)

    def test_gradients_of_a_mixed_batch_are_the_sum_of_its_rows(self, model):
        call, depths = self.mixed()
        total = {}
        for i, depth in enumerate(depths):
            single = gradients(self.cut(model, depth), self.one(call, i))
            for name, gradient in single.items():
                total[name] = total.get(name, 0) + gradient
        with self.on(model):
            same_gradients(gradients(model, call), total)

    def test_checkpointing_changes_no_gradient(self, model):
        mixed, alike = self.mixed()[0], self.mixed((1, 1, 1))[0]
        with self.on(model):
            expected = gradients(model, mixed, alike)
            model.enable_gradient_checkpointing()
            same_gradients(gradients(model, mixed, alike), expected)

    @torch.no_grad()
    def test_a_sampling_loop(self, model):
        """Every step runs the blocks that its noise level asks for, whatever the step count."""
        call, scheduler = self.inputs(2), self.scheduler()
        name = next(iter(call))  # the sample's

        def sample(network_at):
            torch.manual_seed(0)  # some schedulers add noise
            latents = call[name]
            for t in self.steps(scheduler, 7):
                given = call | {name: latents, "timestep": self.given(t.expand(2))}
                output = network_at(float(t))(**given).sample[:, : latents.shape[1]]
                latents = scheduler.step(output / 50, t, latents, return_dict=False)[0]
            return latents

        visited = {self.depth_of(float(t)) for t in self.steps(scheduler, 7)}
        assert visited == {4, 3, 1}
        cut = {depth: self.cut(model, depth) for depth in visited}
        expected = sample(lambda t: cut[self.depth_of(t)])
        with enable(model, SCHEDULE, scheduler=scheduler):
            close(sample(lambda _: model), expected)

    def test_its_pipeline(self, model):
        """Pipelines call the network as they do: what it is given tells its noise level."""
        pipe, given = self.pipeline(model)
        pipe.set_progress_bar_config(disable=True)
        given |= {"num_inference_steps": 6, "output_type": "latent"}

        def sample():
            return pipe(**given, generator=torch.Generator().manual_seed(0))[0]

        calls, seen = [], self.watch(model)
        getattr(model, self.lists[0])[0].register_forward_pre_hook(
            lambda *_: calls.append(len(seen))
        )
        with enable(pipe, SCHEDULE):
            sample()
        runs = np.diff([*calls, len(seen)]).tolist()
        depths = [self.depth_of(float(t)) for t in self.visited(pipe.scheduler)]
        assert set(depths) == {4, 3, 1}
        assert runs == [run for depth in depths for run in self.blocks_of_step(depth)]
        with enable(pipe, "uniform:2"):
            output = sample()
        pipe.transformer = self.cut(model, 2)
        assert torch.equal(output, sample())


class Compiled:
    """Common test of the families whose own forward torch.compile takes as one graph."""

    @torch.no_grad()
    def test_compiled_there_is_one_graph_for_each_depth(self, model):
        torch._dynamo.reset()
        graphs = []

        def counting(module, _):
            graphs.append(module)
            return module.forward

        calls = [self.mixed((i, i))[0] for i in (1, 2)]
        later = [c | {"timestep": c["timestep"] * 0.999} for c in calls]
        expected = [self.cut(model, d)(**c).sample for c, d in zip(calls, (3, 1), strict=True)]
        compiled = torch.compile(model, backend=counting, fullgraph=True)
        with self.on(compiled):
            for call, other, output in zip(calls, later, expected, strict=True):
                close(compiled(**call).sample, output)
                compiled(**other)
        assert len(graphs) == 2
        torch._dynamo.reset()


class WithResiduals:
    """Common tests of the families that a ControlNet can steer from outside.

    A family gives ``residuals(batch)``, the arguments that carry them, and ``kept(call, depth)``,
    the call that gives the network cut to ``depth`` the residuals of the blocks it still has.
    """

    @torch.no_grad()
    def test_an_exit_keeps_the_residuals_of_its_blocks(self, model):
        call = self.mixed()[0] | self.residuals(4)
        plain = model(**self.mixed()[0]).sample
        assert not torch.equal(model(**call).sample, plain)
        for depth in (1, 2, 3, 4):
            expected = self.cut(model, depth)(**self.kept(call, depth)).sample
            with self.on(model, f"uniform:{depth}"):
                assert torch.equal(model(**call).sample, expected)

    @torch.no_grad()
    def test_a_mixed_batch_with_residuals_is_run_depth_by_depth(self, model):
        call, depths = self.mixed()
        call |= self.residuals(4)
        singles = [
            self.cut(model, d)(**self.kept(self.one(call, i), d)).sample
            for i, d in enumerate(depths)
        ]
        with self.on(model):
            close(model(**call).sample, torch.cat(singles))
