"""Transforms of keys and values that attention undoes exactly, composed.

A step maps stored numbers, and its *dual* maps what reads them:

    keys     k' = forward(k),  q' = transform_query(q),  q' . k' = q . k  up to a number that all keys of a query share
    values   v' = forward(v),  the attention output o' of v' gives o = inverse(o')

Every step can be applied while the model runs. An export may fold the first steps of a chain into weights
(``plan.py``, ``fold.py``): the model then gives k' and q' of those steps itself, and only the others remain.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import torch

from kvq.transforms.composed import Composed


class Step(ABC):
    """One transform of the KV heads of a group; x is [..., K, T, D], q is [..., K, M, D].

    stays   why weights cannot take it over, whatever the model; None: its matrix is tried (``plan.py``).
    offset  [K, D], what keys lose where the codec is, rotated to their positions (``rope_bias.py``); None: nothing.
    joint   what is stored of a head has parts of other heads in it.
    """

    stays: str | None = None
    offset: torch.Tensor | None = None
    joint: bool = False

    @abstractmethod
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What is stored for x."""

    def transform_query(self, q: torch.Tensor) -> torch.Tensor:
        """What queries become, so that products with written keys are the model's (keys only)."""
        raise NotImplementedError(f"{type(self).__name__} is a step of values: nothing reads it by queries")

    @abstractmethod
    def inverse(self, x: torch.Tensor) -> torch.Tensor:
        """Inverse of ``forward``; for values, also what the attention output needs."""

    def of_heads(self, heads: Sequence[int]) -> "Step":
        """The same step for some of the layer's KV heads; here: one that is the same for all."""
        return self


@dataclass(frozen=True)
class Chain:
    """Steps in the order in which they are written; without steps that are left to apply it changes nothing.

    folded   how many of the first steps the model's weights have taken over.

    Numbers of 16 bits are transformed in float32 and rounded once.
    """

    steps: Sequence[Step] = ()
    folded: int = 0
    _placed: dict = field(init=False, default_factory=dict, compare=False, repr=False)

    def __bool__(self) -> bool:
        return len(self.steps) > self.folded

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _through(x, self._left, "forward")

    def transform_query(self, q: torch.Tensor) -> torch.Tensor:
        return _through(q, self._left, "transform_query")

    def inverse(self, x: torch.Tensor) -> torch.Tensor:
        return _through(x, self._left[::-1], "inverse")

    @cached_property
    def _left(self) -> tuple[Step, ...]:
        """The steps that are left to apply."""
        return tuple(self.steps[self.folded :])

    def to(self, device: torch.device, dtype: torch.dtype) -> "Chain":
        """The same chain for numbers of ``dtype`` on ``device``: its tensors lie there, as they are applied.

        Made once for every pair; what is derived from a step's tensors (an inverse) is derived before rounding.
        """
        if not self.steps:
            return self
        key = device, _wide(dtype)
        if key not in self._placed:
            self._placed[key] = Chain(tuple(_placed(step, *key) for step in self.steps), self.folded)
        return self._placed[key]

    def composed(self, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> Composed:
        """The same chain as one product a direction, for all its ``heads`` KV heads; made once."""
        key = heads, head_dim, device, dtype
        if key not in self._placed:
            self._placed[key] = Composed(self, *key)
        return self._placed[key]

    def __reduce__(self):
        # What lies on a device is made anew there.
        return Chain, (self.steps, self.folded)

    def __deepcopy__(self, memo) -> "Chain":
        # Nothing of a chain changes, so copies of a cache share it.
        return self

    @cached_property
    def joint(self) -> bool:
        """Whether what is stored of a head has parts of other heads in it."""
        return any(step.joint for step in self._left)

    @cached_property
    def whole(self) -> "Chain":
        """All steps, as if nothing were folded."""
        return replace(self, folded=0)

    def first(self, count: int) -> "Chain":
        """The first ``count`` steps, none of them folded."""
        return Chain(tuple(self.steps[:count]))

    def of_heads(self, heads: Sequence[int]) -> "Chain":
        return replace(self, steps=tuple(step.of_heads(heads) for step in self.steps))


def _through(x: torch.Tensor, steps: Sequence[Step], direction: str) -> torch.Tensor:
    if not steps:
        return x
    dtype = x.dtype
    x = x.to(_wide(dtype))
    for step in steps:
        x = getattr(step, direction)(x)
    return x.to(dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def _placed(step: Step, device: torch.device, dtype: torch.dtype) -> Step:
    """A copy of a step with its tensors on a device; what it derives from them, it derives from the step's own."""
    twin = copy.copy(step)
    object.__setattr__(twin, "__class__", _placed_type(type(step)))
    derived = _derived(type(step))
    moved = {name: _moved(value, device, dtype) for name, value in vars(step).items() if name not in derived}
    vars(twin).clear()
    vars(twin).update(moved, _origin=step, _place=(device, dtype))
    return twin


def _derived(kind: type) -> set[str]:
    return {name for base in kind.__mro__ for name, part in vars(base).items() if isinstance(part, cached_property)}


@lru_cache
def _placed_type(kind: type) -> type:
    def derived(name: str) -> cached_property:
        return cached_property(lambda step: _moved(getattr(step._origin, name), *step._place))

    def reduce(step: Step) -> tuple:
        # A class made here has no name to be pickled by; the copy is made again of its origin.
        return _placed, (step._origin, *step._place)

    return type(kind.__name__, (kind,), {name: derived(name) for name in _derived(kind)} | {"__reduce__": reduce})


def _moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if isinstance(value, tuple):
        return tuple(_moved(part, device, dtype) for part in value)
    if not isinstance(value, torch.Tensor):
        return value
    # A forward in inference mode must not leave tensors that training cannot use.
    with torch.inference_mode(False), torch.no_grad():
        return value.to(device, dtype if value.is_floating_point() else value.dtype)
