"""What folding does to weights: operations on slices of single tensors, in float64, rounded once.

Row vectors throughout: a projection of weight W [out, in] gives y = x W^T. With y' = y M on one head,

    rows of that head      W' = M^T W,  b' = M^T b          (keys, values, queries)
    columns of that head   W' = W M^T                       (the output projection, which reads o' with o = o' M)
    a norm's weight        w' = (w + offset) * f - offset   (gamma' = gamma * f)

Every tensor stands alone, so a layer's tensors may lie in any shards and one at a time is enough.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows ``span`` of a weight or bias become ``matrix`` [D, D] times themselves."""

    span: slice
    matrix: torch.Tensor

    def apply(self, tensor: torch.Tensor) -> None:
        tensor[self.span] = (self.matrix @ tensor[self.span].double()).to(tensor.dtype)


@dataclass(frozen=True, eq=False)
class Columns:
    """Columns ``span`` of a weight are multiplied by ``matrix`` [D, D] from the right."""

    span: slice
    matrix: torch.Tensor

    def apply(self, tensor: torch.Tensor) -> None:
        tensor[:, self.span] = (tensor[:, self.span].double() @ self.matrix).to(tensor.dtype)


@dataclass(frozen=True, eq=False)
class Gamma:
    """A norm's gamma = offset + weight is multiplied by ``factor``, of as many numbers as the weight."""

    factor: torch.Tensor
    offset: int

    def apply(self, tensor: torch.Tensor) -> None:
        gamma = tensor.double() + self.offset
        tensor.copy_((gamma * self.factor.view_as(gamma) - self.offset).to(tensor.dtype))


Operation = Rows | Columns | Gamma


def fold(tensor: torch.Tensor, operations: Sequence[Operation]) -> torch.Tensor:
    """A folded copy of a tensor, in its dtype. No two operations touch the same numbers, so each is rounded once."""
    folded = tensor.clone()
    with torch.no_grad():
        for operation in operations:
            operation.apply(folded)
    return folded
