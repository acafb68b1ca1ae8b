"""Count the attentions that a small DiT computes in a run, and list what is attached to a model."""

from contextlib import contextmanager

import torch

from accelkit.sample.generate import Sampling, generate_latents

TEN = Sampling("ddim", 10)
"""Visits 900, 800, ... 0."""


def sample(pipe, how=TEN, batch=2):
    return generate_latents(pipe, list(range(1, batch + 1)), list(range(batch)), how)


@contextmanager
def counted(blocks):
    """Yield, for each block, a list of the shapes (B, N, D) of the tokens its queries come from."""
    seen, handles = [[] for _ in blocks], []
    for shapes, block in zip(seen, blocks, strict=True):
        queries = block.attn1.to_q

        def note(module, args, shapes=shapes):
            shapes.append(tuple(args[0].shape))

        handles.append(queries.register_forward_pre_hook(note))
    yield seen
    for handle in handles:
        handle.remove()


def traces(model):
    """Return everything attached to a model's modules, and its weights."""
    attached = {}
    for name, module in model.named_modules():
        inside = dict(module.__dict__)
        for key in list(inside):
            if isinstance(inside[key], dict):
                inside |= {(key, k): id(v) for k, v in inside.pop(key).items()}
        registry = inside.get("_diffusers_hook")
        attached[name] = {k: id(v) if not isinstance(v, int) else v for k, v in inside.items()}
        attached[name]["hooks"] = None if registry is None else list(registry._hook_order)
    return attached, {name: value.clone() for name, value in model.state_dict().items()}


def same(before, after):
    assert before[0] == after[0]
    assert before[1].keys() == after[1].keys()
    assert all(torch.equal(before[1][name], after[1][name]) for name in before[1])
