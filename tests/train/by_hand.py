"""A plain training loop in torch alone, which the real one has to agree with."""

import math
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler
from toy_run import CLASSES, Toy, build, depths, drawn

from accelkit.noise.axis import REFERENCE
from accelkit.noise.processes import DiscreteProcess
from accelkit.train.objectives import denoising_loss


@dataclass
class ByHand:
    """Results of a loop.

    Attributes:
        model: with the teacher's weights.
        losses, norms: loss and gradient norm before clipping of each step.
        rates: learning rate of each step, and of the one that would follow.
        updates: number of times the optimiser changed the weights.
        tries: number of passes over a batch, including those whose gradients overflowed.
    """

    model: torch.nn.Module
    losses: list
    norms: list
    rates: list
    updates: int
    tries: int


def rate_of(config, step):
    """A linear warm-up from 0, then constant or half a cosine down to 0."""
    if step < config.lr_warmup_steps:
        return config.learning_rate * step / config.lr_warmup_steps
    if config.lr_schedule == "constant":
        return config.learning_rate
    left = (step - config.lr_warmup_steps) / (config.steps - config.lr_warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * left))


def train_by_hand(config, schedule, model=None, scaler=None):
    """Train with samples one by one, each through a network that is cut to its depth.

    With a scaler it runs in fp16 and repeats a batch whose gradients overflow.
    """
    model, process = model or build(), DiscreteProcess(DDIMScheduler().betas)
    blocks = model.transformer_blocks
    for block in blocks:
        block.norm1.emb = blocks[0].norm1.emb
    blocks[0].norm1.emb.class_embedder.dropout_prob = 0.0
    student = {name: value for name, value in model.named_parameters() if value.requires_grad}
    teacher = {name: value.detach().clone() for name, value in student.items()}
    optimizer = torch.optim.AdamW(student.values(), weight_decay=config.weight_decay)
    done = ByHand(model, [], [], [rate_of(config, step) for step in range(config.steps + 1)], 0, 0)
    samples, half = Toy(), scaler is not None
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    while done.updates < config.steps:
        step = done.updates
        done.tries += 1
        batch = drawn(config, step)
        x0 = samples.sample(batch.rows, batch.posterior)
        xt = DDIMScheduler().add_noise(x0, batch.noise, batch.timestep)
        labels = torch.where(batch.drop, CLASSES, samples.labels[batch.rows])
        outputs = []
        for row, depth in enumerate(depths(batch.timestep, schedule)):
            model.transformer_blocks = blocks[:depth]
            one = slice(row, row + 1)
            with torch.autocast("cpu", torch.float16, enabled=half):
                outputs.append(model(xt[one], batch.timestep[one], labels[one]).sample)
        model.transformer_blocks = blocks
        loss = denoising_loss(process, torch.cat(outputs), x0, batch.noise, xt, batch.timestep)
        levels = torch.tensor(REFERENCE.levels(batch.timestep))
        loss = (loss * config.weight_at(step, levels)).mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(student.values(), config.max_grad_norm)
        optimizer.param_groups[0]["lr"] = done.rates[step]
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() < scale:  # it skipped the step
            continue
        done.updates += 1
        done.losses.append(loss.item())
        done.norms.append(norm.item())
        decay = min((1 + step) / (10 + step), config.ema_decay) if step else 0
        for name, value in student.items():
            teacher[name].lerp_(value.detach(), 1 - decay)
    for name, value in student.items():
        value.data.copy_(teacher[name])
    return done
