"""A network with a schedule, recorded by PyTorch's tracers and exporters."""

import warnings

import pytest
import torch
from small_models import SD3, DiT, PixArt, UViT, close, families
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import accelkit
from accelkit.backbones import registry
from accelkit.errors import AccelkitError
from accelkit.runtime.switch import disable, enable

WAY = r"one at a time, each with accelkit\.enable\(model, 'uniform:K'\)"


class Positional(nn.Module):
    """A network that takes a family's tensors by position, as recorders pass them."""

    def __init__(self, family, model):
        super().__init__()
        self.model = model
        self.names = [k for k, v in family.call(100).items() if isinstance(v, torch.Tensor)]
        self.rest = {k: v for k, v in family.call(100).items() if k not in self.names}

    def given(self, family, timestep):
        call = family.call(timestep)
        return tuple(call[name] for name in self.names)

    def forward(self, *tensors):
        call = dict(zip(self.names, tensors, strict=True))
        return self.model(**call, **self.rest, return_dict=False)[0]


def traced(module, given):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sizes are recorded as numbers, in diffusers as well
        return torch.jit.trace(module, given, check_trace=False)


def exported(module, given):
    return torch.export.export(module, given, strict=False).module()


def exported_strictly(module, given):
    return torch.export.export(module, given, strict=True).module()


def made_fx(module, given):
    return make_fx(module)(*given)


recorders = pytest.mark.parametrize(
    ("record", "name"),
    [(traced, "torch.jit.trace"), (exported, "torch.export"), (made_fx, "make_fx")],
)


@families(DiT, UViT)
@recorders
def test_several_depths_are_refused(family, record, name):
    model = family.make()
    module = Positional(family, model)
    enable(model, family.schedule)
    with torch.no_grad(), pytest.raises(AccelkitError, match=f"{name} would record .* {WAY}"):
        record(module, module.given(family, 900))
    with torch.no_grad():  # calls go on as before
        for timestep, depth in family.depths.items():
            found = model(**family.call(timestep)).sample
            close([found], [family.cut(family.make(), depth)(**family.call(timestep)).sample])


def test_an_export_by_dynamo_names_the_way():
    family = DiT()
    model = family.make()
    module = Positional(family, model)
    enable(model, family.schedule)
    with torch.no_grad(), pytest.raises(Exception, match=WAY):  # wrapped by torch
        exported_strictly(module, module.given(family, 900))


class Caller(nn.Module):
    """Calls a model with three tensors, the only inputs that a symbolic trace can have."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, sample, timestep, labels):
        return self.model(sample, timestep=timestep, class_labels=labels, return_dict=False)[0]


def test_a_symbolic_trace_names_the_way():
    family = DiT()
    model = family.make()
    enable(model, family.schedule)
    with pytest.raises(AccelkitError, match=f"torch.fx would record .* {WAY}"):
        torch.fx.symbolic_trace(Caller(model))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden_states):
        return hidden_states + torch.tanh(self.linear(hidden_states))


class Straight(nn.Module):
    """A network without branches, which no trace of diffusers' networks can follow."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.out = nn.Linear(8, 8)

    def forward(self, sample, timestep, class_labels, return_dict=False):
        hidden = sample
        for block in self.blocks:
            hidden = block(hidden)
        return (self.out(hidden) + class_labels[:, None], timestep)


class StraightBackbone(accelkit.Backbone):
    family = "straight"
    batched = ("sample", "class_labels")

    @property
    def blocks(self):
        return self.model.blocks

    @property
    def exit(self):
        return self.model.out


@pytest.fixture
def straight(monkeypatch):
    monkeypatch.setattr(registry, "_families", dict(registry._families))
    accelkit.register_backbone(Straight, StraightBackbone)
    torch.manual_seed(0)
    return Straight()


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_symbolic_trace_of_one_depth(straight, depth):
    cut = Straight()
    cut.load_state_dict(straight.state_dict())
    cut.blocks = cut.blocks[:depth]
    given = torch.randn(2, 8), torch.full((2,), 900.0), torch.arange(2)
    enable(straight, f"uniform:{depth}")
    graph = torch.fx.symbolic_trace(Caller(straight))
    assert torch.equal(graph(*given), cut(*given)[0])


def test_a_symbolic_trace_that_misses_the_schedule_is_refused(straight):
    enable(straight, "uniform:2")
    with pytest.raises(AccelkitError, match="trace a module that calls the model"):
        torch.fx.symbolic_trace(straight)


@pytest.mark.parametrize(
    ("kind", "record"),
    [
        *((DiT, record) for record in (traced, exported, exported_strictly, made_fx)),
        *((UViT, record) for record in (traced, exported, exported_strictly, made_fx)),
        (SD3, exported),
        (PixArt, traced),
    ],
)
def test_one_depth_is_recorded_as_it_is(kind, record):
    """At the least depth, and by one recorder at the full one as well."""
    family = kind()
    for depth in sorted(family.depths.values())[:: 2 if record is traced else 3]:
        model = family.make()
        module = Positional(family, model)
        enable(model, f"uniform:{depth}")
        with torch.no_grad():
            recorded = record(module, module.given(family, 100))
            cut = family.cut(family.make(), depth)
            for timestep in (100, 900):
                given = module.given(family, timestep)
                close([recorded(*given)], [cut(**family.call(timestep)).sample])


@pytest.mark.parametrize("record", [traced, exported])
def test_merging_at_one_depth_is_recorded(record):
    family = DiT()
    model = family.make()
    module = Positional(family, model)
    enable(model, "uniform:4+tome:0.5:F4", kernels="off")
    with torch.no_grad():
        recorded = record(module, module.given(family, 100))
        for timestep in (100, 900):
            given = module.given(family, timestep)
            close([recorded(*given)], [model(**family.call(timestep)).sample])


def test_onnx():
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    family = DiT()
    model = family.make()
    module = Positional(family, model).eval()
    enable(model, family.schedule)
    given = module.given(family, 100)
    with pytest.raises(Exception, match=WAY):
        torch.onnx.export(module, given, dynamo=True, verbose=False)
    disable(model)
    enable(model, "uniform:4")
    program = torch.onnx.export(module, given, dynamo=True, verbose=False)
    session = reference.ReferenceEvaluator(program.model_proto)
    names = [value.name for value in program.model_proto.graph.input]
    for timestep in (100, 900):
        given = module.given(family, timestep)
        fed = {name: value.numpy() for name, value in zip(names, given, strict=True)}
        with torch.no_grad():
            expected = model(**family.call(timestep)).sample
        close([torch.from_numpy(session.run(None, fed)[0])], [expected])
