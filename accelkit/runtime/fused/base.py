"""What fused forwards have in common: when one serves, and noticing that a model changed."""

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

from accelkit.backbones import Backbone
from accelkit.runtime import conflicts, recording
from accelkit.runtime.fused.gate import Gate
from accelkit.runtime.fused.stale import Joined, Watch, unfit, unusual
from accelkit.runtime.routing import Plan

Block = Callable[..., Any]
Step = tuple[Tensor, int]
"""All timesteps of a sampling run, and which of them a call is for."""


class Pass(ABC):
    """One pass over a model's blocks as a function of its tensors alone.

    Everything that needs a look at numbers, such as which labels a batch has, was decided when it
    was made. So a pass can be captured as a graph, and another's tensors be put into it.

    Attributes:
        tensors: what it reads beside the weights, by name.
        key: what decides, beside the sizes of its tensors, which operations it runs.
        repeats: whether others of the same key are to be expected, of which one graph is worth it.
    """

    tensors: dict[str, Tensor]
    key: tuple[Any, ...]
    repeats: bool

    @abstractmethod
    def __call__(self, tensors: dict[str, Tensor]) -> Tensor:
        """Return the model's prediction for ``tensors``, named and sized as its own."""


class FusedForward(ABC):
    """A model's forward pass in few, large operations.

    A family gives :meth:`outside`, :meth:`odd`, :meth:`build` and :meth:`begin`.

    Attributes:
        blocks: what runs each of the backbone's ``all_blocks``, None for one that runs as it is.
        refusal: why no call is fused, None if calls are.
        looks: how often the model was looked at, after each of which its weights lie elsewhere.
        graphs: what runs passes, by a graph each (:mod:`accelkit.runtime.fused.graphs`), if any.
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
        self._watch: Watch | None = None
        self._handle: Any = None  # of its hook on the model, while it is open
        self._gate = Gate()  # calls run at the same time, and while none does weights are joined

    @abstractmethod
    def outside(self) -> list[nn.Module]:
        """Return the modules beside the blocks that are not called but replaced."""

    @abstractmethod
    def odd(self, block: nn.Module) -> str | None:
        """Return why a block has to run as it is, None if it can be fused."""

    def joins(self, block: nn.Module) -> list[Tensor]:
        """Return the weights of a block, not an odd one, that are joined with others."""
        return []

    @abstractmethod
    def build(self, block: nn.Module) -> Block:
        """Return what runs a block that is not odd, its weights joined."""

    @abstractmethod
    def begin(self, plan: Plan, call: dict[str, Any], step: Step | None) -> Pass | None:
        """Return the pass of a call, None if it is to run as it is.

        Args:
            plan: what it runs of the blocks.
            call: the arguments of the model's call by name.
            step: which of its sampling run it is; None if it is not known to be of one.
        """

    def odd_outside(self) -> str | None:
        """Return why what is outside the blocks cannot be replaced, None if it can."""
        return None

    def built(self) -> None:  # noqa: B027 - some have nothing more
        """Read what the fused blocks share, after them."""

    def __call__(
        self, plan: Plan, step: Step | None, forward: Any, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Return what the model's call returns, by its own ``forward`` where that is to run.

        So it is for gradients, in a graph or transform that is being traced, under autocast, where
        tokens are merged, where hooks are on all modules there are, and if ``forward`` is more than
        that of the model's class.
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
        """Return the fused pass of a model's call, None where the model's own forward is to run."""
        if self.refusal is not None or self._something_on_a_skipped_block(plan):
            return None
        return self.begin(plan, call, step)

    def _call(self, args: Any, kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """Return the arguments of a model's call by name, None if it cannot be fused."""
        call = dict(zip(self._names, args, strict=False)) | kwargs
        known = len(call) == len(args) + len(kwargs) and call.keys() <= set(self._names)
        sample = call.get(self._names[0])
        if not known or not isinstance(sample, Tensor):
            return None  # for the model to refuse
        if sample.is_meta or torch.is_autocast_enabled(sample.device.type):
            return None
        return call

    def _stale(self) -> bool:
        """Whether the model has to be looked at, for the first time or because it changed."""
        watch = self._watch
        return watch is None or not watch.same() or not all(j.holds() for j in self._joined)

    def survey(self) -> list[str | None]:
        """Return for each block why it runs as it is, None for one that is fused."""
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
        """See which blocks are as their classes made them, and join their weights."""
        self.part()
        self.looks += 1
        reasons = self.survey()
        self.refusal = reasons[0] if all(reasons) else None
        self.blocks = [
            None if reason else self.build(block)
            for block, reason in zip(self.backbone.all_blocks, reasons, strict=True)
        ]
        if self.refusal is None:
            self.built()
        self._watch = Watch([self.model])

    def joined(self, parameters: Iterable[Tensor]) -> Tensor:
        """Return parameters as one tensor that they are parts of from now on."""
        self._joined.append(Joined(parameters))
        return self._joined[-1].whole

    def part(self) -> None:
        """Give all parameters their own storage again; the next call joins them anew."""
        with self._gate.change():
            self._watch = None
            while self._joined:
                self._joined.pop().part()

    def open(self) -> None:
        """Be there for the model's calls, again if it was closed."""
        # what saves a model may take weights in one storage for copies of each other
        self._handle = self.model.register_state_dict_pre_hook(lambda *_: self.part())

    @contextmanager
    def bare(self, model: dict[str, Any]) -> Iterator[None]:
        """Take its hook out of a model's attributes, and keep weights in place while entered."""
        name = "_state_dict_pre_hooks"
        model[name] = OrderedDict((k, v) for k, v in model[name].items() if k != self._handle.id)
        with self._gate.call():
            yield

    def close(self) -> None:
        """Leave the model as it was."""
        self.part()
        self._handle.remove()

    def _own(self, forward: Any) -> bool:
        """Whether nothing but the class's own forward would run, inside of accelkit's hook."""
        return getattr(forward, "__func__", None) is type(self.model).forward

    def _changed(self) -> str | None:
        """Return what is on the model itself, or was put into its class, that has to run."""
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
        """Whether it is for a skipped block's own module to run what hangs on it."""
        counted = self.blocks[len(self.blocks) - self.backbone.depth :]
        return any(
            block is None and plan.rows_at(index) is not None for index, block in enumerate(counted)
        )


def _traced() -> bool:
    """Whether a call is being turned into something else, or modules are to run as modules."""
    if nn.modules.module._has_any_global_hook():
        return True
    if torch.compiler.is_compiling() or recording.by() is not None:
        return True
    return torch._C._are_functorch_transforms_active()  # vmap, jvp and their like
