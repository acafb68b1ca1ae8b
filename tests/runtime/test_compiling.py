"""Models and blocks compiled in place by torch.compile, before or after their schedule."""

import pytest
import torch
from small_models import DiT, Flux, ShortDiT, UViT, both, by_hand, close, outputs

from accelkit.runtime.switch import disable, enable


@pytest.fixture
def graphs():
    """A backend that keeps the graphs it compiles."""

    class Graphs(list):
        def __call__(self, graph, _):
            self.append(graph)
            return graph.forward

    torch._dynamo.reset()
    yield Graphs()
    torch._dynamo.reset()


@pytest.mark.parametrize(("kind", "first"), [(ShortDiT, "schedule"), (UViT, "other")])
def test_a_model_compiled_in_place_is_one_graph_for_each_depth(kind, graphs, first):
    family = kind()

    def compiled(model):
        model.compile(backend=graphs, fullgraph=True)

    model = both(family.make(), family, compiled, first)
    close(outputs(family, model), by_hand(family, family.make))
    assert len(graphs) == len(family.depths)
    disable(model)
    assert "compile" not in vars(model)
    close(outputs(family, model), outputs(family, family.make()))
    assert len(graphs) == len(family.depths) + 1  # still compiled, without the schedule


def test_blocks_compiled_in_place_are_one_graph_for_all_depths(graphs):
    family = Flux()

    def compiled(model):
        model.compile_repeated_blocks(backend=graphs, fullgraph=True)

    plain = family.make()
    compiled(plain)
    outputs(family, plain)
    needed = len(graphs)
    torch._dynamo.reset()
    graphs.clear()
    model = both(family.make(), family, compiled, first="other")
    close(outputs(family, model), by_hand(family, family.make))
    assert len(graphs) <= needed + 1
    disable(model)
    assert not any("compile" in vars(module) for module in model.modules())
    close(outputs(family, model), outputs(family, family.make()))


def test_blocks_compiled_in_place_run_on_the_rows_still_active(graphs):
    family = DiT()
    model = family.make()
    enable(model, family.schedule)
    for block in model.transformer_blocks:
        block.compile(backend=graphs, fullgraph=True)
    mixed = family.call(0) | {"timestep": torch.tensor([900, 100])}
    with torch.no_grad():
        found = model(**mixed).sample
    expected = by_hand(family, family.make)
    close([found[0], found[1]], [expected[2][0], expected[0][1]])


def test_blocks_compiled_in_place_under_gradient_checkpointing(graphs):
    family = DiT()
    found = []
    for compiled in (False, True):
        model = family.make()
        enable(model, family.schedule)
        model.enable_gradient_checkpointing()
        model.train()
        if compiled:
            for block in model.transformer_blocks:
                block.compile(backend=graphs)
        call = family.call(0) | {"timestep": torch.tensor([900, 500]), "class_labels": None}
        call["class_labels"] = torch.tensor([1000, 1000])  # the null class is never dropped
        model(**call).sample.square().mean().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    close(found[1].values(), found[0].values())
