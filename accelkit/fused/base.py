"""What fused forwards have in common: when one serves, and noticing that a model changed."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from accelkit.backbones import Backbone
from accelkit.fused.watch import Joined, Watch, unusual
from accelkit.routing import Plan

Block = Callable[..., Any]


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

    A family gives :meth:`outside`, :meth:`read` and :meth:`begin`.

    Attributes:
        reasons: why a block runs as it is, by its number among the backbone's ``all_blocks``; None
            for one that is fused.
        refusal: why no call is fused, None if calls are.
        blocks: what runs each of them, None for one that runs as it is.
        step: returns the timesteps of the run under way and which of them all samples of the call
            have (:meth:`accelkit.routing.Router.step`).
        looks: how often the model was looked at, after each of which its weights lie elsewhere.
        graphs: what runs passes, by a graph each (:mod:`accelkit.fused.graphs`); None runs them.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.model: Any = backbone.model
        self.reasons: list[str | None] = []
        self.refusal: str | None = None
        self.blocks: list[Block | None] = []
        self.step: Callable[[], tuple[Tensor, int] | None] = lambda: None
        self.looks = 0
        self.graphs: Callable[[Pass], Tensor] | None = None
        self._names = list(inspect.signature(type(backbone.model).forward).parameters)[1:]
        self._joined: list[Joined] = []
        self._watch: Watch | None = None
        self._handle: Any = None  # of its hook on the model, while it is open

    @abstractmethod
    def outside(self) -> list[nn.Module]:
        """Return the modules beside the blocks that are not called but replaced."""

    @abstractmethod
    def read(self, block: nn.Module) -> Block | str:
        """Return what runs a block, or why it has to run as it is."""

    @abstractmethod
    def begin(self, plan: Plan, call: dict[str, Any]) -> Pass | None:
        """Return the pass of a call, None if it is to run as it is.

        Args:
            plan: what it runs of the blocks.
            call: the arguments of the model's call by name.
        """

    def finish_reading(self) -> str | None:
        """Read what all blocks share, after them; return why no call can be fused, or None."""
        return None

    def pass_of(self, plan: Plan, args: Any, kwargs: dict[str, Any]) -> Pass | None:
        """Return the fused pass of a model's call, None where the model's own forward is to run.

        So it does for gradients, in a graph that torch.compile traces, under autocast, and where
        tokens are merged.
        """
        if plan.grad or plan.merge is not None or torch.compiler.is_compiling():
            return None
        if not self._current():
            self.look()
        if self.refusal is not None:
            return None
        call = dict(zip(self._names, args, strict=False)) | kwargs
        if self._something_on_a_skipped_block(plan):
            return None
        if torch.is_autocast_enabled(self._sample(call).device.type):
            return None
        return self.begin(plan, call)

    def run(self, each: Pass, args: Any, kwargs: dict[str, Any]) -> Any:
        """Return a pass's prediction as the model's call asks for it."""
        sample = each(each.tensors) if self.graphs is None else self.graphs(each)
        call = dict(zip(self._names, args, strict=False)) | kwargs
        if call.get("return_dict", True):
            return Transformer2DModelOutput(sample=sample)
        return (sample,)

    def look(self) -> None:
        """See which blocks are as their classes made them, and join their weights."""
        self.part()
        self.looks += 1
        blocks = list(self.backbone.all_blocks)
        replaced = self.outside()
        self.reasons, self.blocks = [], []
        self.refusal = unusual(replaced) or _placeless([*replaced, *blocks])
        for block in blocks:
            read = self.refusal or unusual([block]) or self.read(block)
            self.reasons.append(read if isinstance(read, str) else None)
            self.blocks.append(None if isinstance(read, str) else read)
        if self.refusal is None and not any(self.blocks):
            self.refusal = self.reasons[0]
        if self.refusal is None:
            self.refusal = self.finish_reading()
        self._watch = Watch([self.model])

    def joined(self, parameters: Iterable[Tensor]) -> Tensor:
        """Return parameters as one tensor that they are parts of from now on."""
        self._joined.append(Joined(parameters))
        return self._joined[-1].whole

    def part(self) -> None:
        """Give all parameters their own storage again; the next call joins them anew."""
        self._watch = None
        while self._joined:
            self._joined.pop().part()

    def open(self) -> None:
        """Be there for the model's calls, again if it was closed."""
        # what saves a model may take weights in one storage for copies of each other
        self._handle = self.model.register_state_dict_pre_hook(lambda *_: self.part())

    def close(self) -> None:
        """Leave the model as it was."""
        self.part()
        if self._handle is not None:
            self._handle.remove()

    def _something_on_a_skipped_block(self, plan: Plan) -> bool:
        """Whether it is for a skipped block's own module to run what hangs on it."""
        counted = self.reasons[len(self.reasons) - self.backbone.depth :]
        return any(
            plan.staying(index) is not None and counted[index] for index in range(len(counted))
        )

    def _sample(self, call: dict[str, Any]) -> Tensor:
        return call[self.backbone.batched[0]]  # type: ignore[index]

    def _current(self) -> bool:
        watch = self._watch
        return watch is not None and watch.same() and all(j.holds() for j in self._joined)


def _placeless(modules: list[nn.Module]) -> str | None:
    """Why the weights of some modules cannot be joined, or None."""
    for module in modules:
        for parameter in module.parameters():
            if parameter.is_meta:
                return "its weights are elsewhere"
            if parameter.is_inference():
                return "its weights were made in inference mode"
    return None
