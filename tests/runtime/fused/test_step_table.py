"""The conditioning of a whole sampling run from one table."""

import pytest
import torch
from diffusers import DDIMScheduler
from small_models import DiT, mixed
from test_fused import relative

from accelkit.runtime.fused import modulation
from accelkit.runtime.switch import disable, enable

SCHEDULE = DiT.schedule


class Run:
    """Calls of a model in a sampling run of ten steps."""

    def __init__(self, model, labels=(3, 3, 1000, 7), schedule=SCHEDULE, kernels="auto"):
        self.model, self.scheduler = model, DDIMScheduler()
        self.labels = torch.tensor(labels)
        self.scheduler.set_timesteps(10)
        self.state = enable(model, schedule, scheduler=self.scheduler, kernels=kernels)
        self.call = mixed(DiT(), [0] * len(labels))

    @torch.no_grad()
    def at(self, place, labels=None):
        step = self.scheduler.timesteps[place]
        call = self.call | {"timestep": step.expand(len(self.labels))}
        return self.model(
            **call | {"class_labels": self.labels if labels is None else labels}
        ).sample

    @property
    def bytes(self):
        return self.state.fused.run.steps.bytes


def check(model, run_of):
    """Compare every step with the model's own modules on the same weights."""
    count = len(run_of.scheduler.timesteps)
    outputs = [run_of.at(place) for place in range(count)]
    twin = DiT().make()
    with torch.no_grad():
        for own, new in zip(twin.parameters(), model.parameters(), strict=True):
            own.copy_(new)
    plain = Run(twin, run_of.labels.tolist(), run_of.state.schedule, kernels="off")
    plain.scheduler.set_timesteps(count)
    for place, output in enumerate(outputs):
        assert relative(output, plain.at(place)) < 1e-6


@pytest.mark.parametrize("labels", [(3, 3, 1000, 7), (5,), (5, 5)])
@pytest.mark.parametrize("schedule", [SCHEDULE, "full"])
@pytest.mark.parametrize("shared", [True, False], ids=["one embedder", "one each"])
def test_a_run_by_its_table(labels, schedule, shared):
    model = DiT().make()
    if shared:
        for block in model.transformer_blocks:
            block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    each = Run(model, labels, schedule)
    each.at(0)
    each.at(1)
    assert each.bytes == 0
    check(model, each)
    vectors, width = 2 + 6 * 6, 16
    assert each.bytes == 10 * len(set(labels)) * vectors * width * 4


def test_new_labels_at_every_call_make_no_table():
    each = Run(DiT().make())
    for place in range(10):
        each.at(place, each.labels.clone().fill_(place))
    assert each.bytes == 0


def test_labels_written_to_start_another_run():
    model = DiT().make()
    each = Run(model)
    for place in range(4):
        each.at(place)
    assert each.bytes > 0
    each.labels[0] = 9
    check(model, each)


@pytest.mark.parametrize(
    "part", ["norm1.linear.weight", "norm1.emb.class_embedder.embedding_table.weight"]
)
def test_weights_written_to_make_another_table(part):
    model = DiT().make()
    each = Run(model)
    for place in range(4):
        each.at(place)
    with torch.no_grad():
        model.transformer_blocks[1].get_parameter(part).mul_(1.5)
    check(model, each)


def test_a_repeated_step_sees_weights_written_through_data():
    model = DiT().make()
    run_of = Run(model)
    for place in (0, 1, 2, 2):
        run_of.at(place)
    assert run_of.bytes > 0
    for parameter in model.parameters():
        parameter.data.mul_(1.1)
    found = run_of.at(2)
    disable(model)
    assert relative(found, Run(model, kernels="off").at(2)) < 1e-5


def test_another_run_makes_its_own():
    model = DiT().make()
    each = Run(model)
    for place in range(4):
        each.at(place)
    ten = each.bytes
    each.scheduler.set_timesteps(20)
    check(model, each)
    assert each.bytes == 2 * ten


def test_a_table_that_is_too_large_is_not_made(monkeypatch):
    monkeypatch.setattr(modulation, "LIMIT", 1000)
    model = DiT().make()
    each = Run(model)
    check(model, each)
    assert each.bytes == 0


def test_a_scheduler_without_a_run_has_none():
    model = DiT().make()
    each = Run(model)
    each.scheduler.timesteps, each.scheduler.num_inference_steps = torch.arange(1000), None
    for _ in range(4):
        each.at(500)
    assert each.bytes == 0


@pytest.mark.parametrize("steps", [2, 10])
def test_a_run_does_not_depend_on_what_ran_before(steps):
    model = DiT().make()
    run_of = Run(model, labels=(5,), schedule="full")

    def sampled():
        run_of.scheduler.set_timesteps(steps)
        run_of.labels = torch.tensor([5])
        return torch.stack([run_of.at(place) for place in range(steps)])

    first = sampled()
    assert all(torch.equal(sampled(), first) for _ in range(4))
