"""The base of fused forwards: which calls they run, and what they do when a model changes."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from accelkit.backbones import Backbone, stale
from accelkit.runtime import conflicts, recording
from accelkit.runtime.fused.gate import Gate
from accelkit.runtime.fused.joined import Joined
from accelkit.runtime.fused.odd import unfit, unusual
from accelkit.runtime.routing import Plan

Block = Callable[..., Any]
Step = tuple[Tensor, int]
"""All timesteps of a sampling run, and the index of a call's timestep among them."""


class Pass(ABC):
    """One pass over a model's blocks as a function of its tensors alone.

    Every decision that depends on numbers, such as the labels of a batch, was made before. So a
    pass can be captured as a graph, and the graph can run on the tensors of another pass.

    Attributes:
        tensors: its inputs other than the weights, by name.
        key: decides, with the sizes of the tensors, which operations it runs.
        repeats: whether more passes with this key are likely, which makes a graph worthwhile.
    """

    tensors: dict[str, Tensor]
    key: tuple[Any, ...]
    repeats: bool

    @abstractmethod
    def __call__(self, tensors: dict[str, Tensor]) -> Tensor:
        """Return the model's prediction for ``tensors``, which match its own in name and size."""


class FusedForward(ABC):
    """A model's forward pass in few, large operations.

    A family defines :meth:`outside`, :meth:`odd`, :meth:`build` and :meth:`begin`.

    Attributes:
        blocks: the fused form of each of the backbone's ``all_blocks``; None for one that runs as
            its own module.
        refusal: why no call is fused, None if calls are.
        looks: how often the model was read. Each time its weights move.
        graphs: runs passes as graphs (:class:`accelkit.runtime.graphs.Graphs`); None if not used.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.model: Any = backbone.model
        self.blocks: list[Block | None] = []
        self.refusal: str | None = None
        self.looks = 0
        self.graphs: Callable[[Pass], Tensor] | None = None
        self._names = list(inspect.signature(type(backbone.model).forward).parameters)[1:]
        self._joined: list[Joined] = []
        self._seen: list[stale.Seen] = []  # the model as it was read; empty if it has to be
        self._handle: Any = None  # of the hook on the model, while open
        self._gate = Gate()  # weights are joined and separated while no call runs

    @abstractmethod
    def outside(self) -> list[nn.Module]:
        """Return the modules other than the blocks that are replaced rather than called."""

    @abstractmethod
    def odd(self, block: nn.Module) -> str | None:
        """Return why a block has to run as its own module, None if it can be fused."""

    def joins(self, block: nn.Module) -> list[Tensor]:
        """Return the weights of a block that are joined with others, if the block is not odd."""
        return []

    @abstractmethod
    def build(self, block: nn.Module) -> Block:
        """Join the weights of a block that is not odd, and return its fused form."""

    @abstractmethod
    def begin(self, plan: Plan, call: dict[str, Any], step: Step | None) -> Pass | None:
        """Return the pass of a call, None if the model's own forward has to run.

        Args:
            plan: which blocks it runs.
            call: the arguments of the model's call by name.
            step: its place in a sampling run, None if unknown.
        """

    def odd_outside(self) -> str | None:
        """Return why the modules of :meth:`outside` cannot be replaced, None if they can."""
        return None

    def built(self) -> None:  # noqa: B027 - optional
        """Read what the fused blocks share, once all are built."""

    def __call__(
        self, plan: Plan, step: Step | None, forward: Any, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Return the model's output, by its own ``forward`` where that has to run.

        It has to for gradients, while a graph or transform is traced, under autocast, if tokens are
        merged, if there are global hooks on modules, and if ``forward`` is not that of the class.
        """
        if _traced():
            return forward(*args, **kwargs)
        call = None
        if not plan.grad and plan.merge is None and self._own(forward):
            call = self._call(args, kwargs)
        if call is None:
            with self._gate.call():
                return forward(*args, **kwargs)
        with self._gate.call(self._stale, self.look):
            each = self.pass_of(plan, call, step)
            if each is None:
                return forward(*args, **kwargs)
            sample = each(each.tensors) if self.graphs is None else self.graphs(each)
        if call.get("return_dict", True):
            return Transformer2DModelOutput(sample=sample)
        return (sample,)

    def pass_of(self, plan: Plan, call: dict[str, Any], step: Step | None) -> Pass | None:
        """Return the fused pass of a call, None if the model's own forward has to run."""
        if self.refusal is not None or self._something_on_a_skipped_block(plan):
            return None
        return self.begin(plan, call, step)

    def _call(self, args: Any, kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """Return the arguments of a call by name, None if it cannot be fused."""
        call = dict(zip(self._names, args, strict=False)) | kwargs
        known = len(call) == len(args) + len(kwargs) and call.keys() <= set(self._names)
        sample = call.get(self._names[0])
        if not known or not isinstance(sample, Tensor):
            return None  # the model raises its own error
        if sample.is_meta or torch.is_autocast_enabled(sample.device.type):
            return None
        return call

    def _stale(self) -> bool:
        """Whether the model has to be read, for the first time or because it changed."""
        seen = self._seen
        return not seen or not all(map(stale.Seen.same, seen))

    def survey(self) -> list[str | None]:
        """Return for each block why it runs as its own module, None for one that is fused."""
        replaced, blocks = self.outside(), list(self.backbone.all_blocks)
        like = next(self.model.parameters())
        whole = self._changed() or unusual(replaced) or unfit(replaced, like)
        whole = whole or self.odd_outside()
        reasons, seen = [], {id(p) for module in replaced for p in module.parameters()}
        for block in blocks:
            reason = whole or unusual([block]) or unfit([block], like) or self.odd(block)
            joined = set() if reason else set(map(id, self.joins(block)))
            if joined & seen:
                reason = "it shares weights with another block"
            seen |= joined
            reasons.append(reason)
        return reasons

    def look(self) -> None:
        """Read the model: build the blocks that can be fused, and join their weights."""
        self.separate()
        self.looks += 1
        reasons = self.survey()
        self.refusal = reasons[0] if all(reasons) else None
        self.blocks = [
            None if reason else self.build(block)
            for block, reason in zip(self.backbone.all_blocks, reasons, strict=True)
        ]
        if self.refusal is None:
            self.built()
        self._seen = [*stale.structure([self.model]), *(each.seen for each in self._joined)]

    def joined(self, parameters: Iterable[Tensor]) -> Tensor:
        """Join parameters, and return the tensor of which they are views."""
        self._joined.append(Joined(parameters))
        return self._joined[-1].whole

    def separate(self) -> None:
        """Give all parameters their own storage again; the next call joins them again."""
        with self._gate.change():
            self._seen = []
            while self._joined:
                self._joined.pop().separate()

    def open(self) -> None:
        """Attach to the model's calls, also after :meth:`close`."""
        # A saver may take weights in one storage for copies of each other.
        self._handle = self.model.register_state_dict_pre_hook(lambda *_: self.separate())

    @contextmanager
    def bare(self, model: dict[str, Any]) -> Iterator[None]:
        """Remove the hook from a copy's attributes, and keep the weights in place while entered."""
        name = "_state_dict_pre_hooks"
        model[name] = OrderedDict((k, v) for k, v in model[name].items() if k != self._handle.id)
        with self._gate.call():
            yield

    def close(self) -> None:
        """Restore the model."""
        self.separate()
        self._handle.remove()

    def _own(self, forward: Any) -> bool:
        """Whether ``forward``, inside accelkit's hook, is that of the model's class."""
        return getattr(forward, "__func__", None) is type(self.model).forward

    def _changed(self) -> str | None:
        """Return what on the model, or in its class, replaces the library's forward, or None."""
        owner: Any = next(kind for kind in type(self.model).__mro__ if "forward" in kind.__dict__)
        written = (owner.forward.__module__, owner.forward.__qualname__)
        own = written == (owner.__module__, f"{owner.__qualname__}.forward")
        if not own or owner.__module__.partition(".")[0] not in ("diffusers", "accelkit"):
            return f"its model's forward is {'.'.join(written)}"
        innermost: Any = self.model.__dict__.get("forward")
        if (registry := self.model.__dict__.get("_diffusers_hook")) is not None:
            names, references = registry._hook_order, registry._fn_refs
            if theirs := conflicts.inside(names):
                return f"a hook of diffusers ({theirs[0]}) on the model"
            innermost = references[0].original_forward if names else innermost
        if innermost is not None and not self._own(innermost):
            return "another forward on the model"
        return None

    def _something_on_a_skipped_block(self, plan: Plan) -> bool:
        """Whether a skipped block has hooks, which its own module has to run."""
        counted = self.blocks[len(self.blocks) - self.backbone.depth :]
        return any(
            block is None and plan.rows_at(index) is not None for index, block in enumerate(counted)
        )


def _traced() -> bool:
    """Whether a call is being traced or transformed, or there are global hooks on modules."""
    if nn.modules.module._has_any_global_hook():
        return True
    if torch.compiler.is_compiling() or recording.by() is not None:
        return True
    return torch._C._are_functorch_transforms_active()  # vmap, jvp and their like
