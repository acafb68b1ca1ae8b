"""Counts the attentions that a run of a small DiT computes, and lists what is put on a model."""

from contextlib import contextmanager

import torch

from accelkit.sample.generate import Sampling, generate_latents

TEN = Sampling("ddim", 10)
"""Visits 900, 800, ... 0."""


def sample(pipe, how=TEN, batch=2):
    return generate_latents(pipe, list(range(1, batch + 1)), list(range(batch)), how)


@contextmanager
def counted(blocks):
    """Lists for every block the shapes of the tokens (B, N, D) that its queries are made of."""
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
    """Everything on a model's modules, and its weights."""
    hung = {}
    for name, module in model.named_modules():
        inside = dict(module.__dict__)
        for key in list(inside):
            if isinstance(inside[key], dict):
                inside |= {(key, k): id(v) for k, v in inside.pop(key).items()}
        registry = inside.get("_diffusers_hook")
        hung[name] = {k: id(v) if not isinstance(v, int) else v for k, v in inside.items()}
        hung[name]["hooks"] = None if registry is None else list(registry._hook_order)
    return hung, {name: value.clone() for name, value in model.state_dict().items()}


def same(before, after):
    assert before[0] == after[0]
    assert before[1].keys() == after[1].keys()
    assert all(torch.equal(before[1][name], after[1][name]) for name in before[1])
