"""Transforms of keys and values that attention undoes exactly, composed.

A step maps stored numbers, and its *dual* maps what reads them:

    keys     k' = write(k),  q' = dual(q),   q' . k' = q . k  up to a number that is the same for all keys of a query
    values   v' = write(v),  the attention output o' of v' gives o = undo(o')

Every step can be applied while the model runs. An export may fold the first steps of a chain into weights
(``plan.py``, ``fold.py``): the model then gives k' and q' of those steps itself, and only the others remain.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch


class Step(Protocol):
    """One transform of the KV heads of a group; x is [..., K, T, D], q is [..., K, M, D]."""

    def write(self, x: torch.Tensor) -> torch.Tensor:
        """What is stored for x."""

    def dual(self, q: torch.Tensor) -> torch.Tensor:
        """What queries become, so that products with written keys are the model's (keys only)."""

    def undo(self, x: torch.Tensor) -> torch.Tensor:
        """Inverse of ``write``; for values, also what the attention output needs."""

    def of_heads(self, heads: Sequence[int]) -> "Step":
        """The same step for some of the layer's KV heads."""


@dataclass(frozen=True)
class Chain:
    """Steps in the order in which they are written; without steps that are left to apply it changes nothing.

    folded   how many of the first steps the model's weights have taken over.

    Numbers of 16 bits are transformed in float32 and rounded once.
    """

    steps: Sequence[Step] = ()
    folded: int = 0

    def __bool__(self) -> bool:
        return len(self.steps) > self.folded

    def write(self, x: torch.Tensor) -> torch.Tensor:
        return self._through(x, [step.write for step in self.steps[self.folded :]])

    def dual(self, q: torch.Tensor) -> torch.Tensor:
        return self._through(q, [step.dual for step in self.steps[self.folded :]])

    def undo(self, x: torch.Tensor) -> torch.Tensor:
        return self._through(x, [step.undo for step in reversed(self.steps[self.folded :])])

    @property
    def whole(self) -> "Chain":
        """All steps, as if nothing were folded."""
        return replace(self, folded=0)

    def first(self, count: int) -> "Chain":
        """The first ``count`` steps, none of them folded."""
        return Chain(tuple(self.steps[:count]))

    def of_heads(self, heads: Sequence[int]) -> "Chain":
        return replace(self, steps=tuple(step.of_heads(heads) for step in self.steps))

    def _through(self, x: torch.Tensor, functions) -> torch.Tensor:
        if not functions:
            return x
        dtype = x.dtype
        x = x if dtype in (torch.float32, torch.float64) else x.float()
        for function in functions:
            x = function(x)
        return x.to(dtype)
