"""What folding does to weights: operations on slices of single tensors, in float64, rounded once.

Row vectors throughout: a projection of weight W [out, in] gives y = x W^T. With y' = y M on one head,

    rows of that head      W' = M^T W,  b' = M^T b          (keys, values, queries)
    columns of that head   W' = W M^T                       (the output projection, which reads o' with o = o' M)
    a norm's weight        w' = (w + offset) * f - offset   (gamma' = gamma * f)

Every tensor stands alone, so a layer's tensors may lie in any shards and one at a time is enough.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

# Numbers of a scaled tensor that are in float64 at a time.
BLOCK = 1 << 18
# Where in a tensor, and what comes there, in float64.
Part = tuple[tuple[slice, ...], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows ``span`` of a weight or bias become ``matrix`` [D, D] times themselves."""

    span: slice
    matrix: torch.Tensor

    def parts(self, tensor: torch.Tensor) -> Iterator[Part]:
        yield (self.span,), self.matrix @ tensor[self.span].double()


@dataclass(frozen=True, eq=False)
class Columns:
    """Columns ``span`` of a weight are multiplied by ``matrix`` [D, D] from the right."""

    span: slice
    matrix: torch.Tensor

    def parts(self, tensor: torch.Tensor) -> Iterator[Part]:
        yield (slice(None), self.span), tensor[:, self.span].double() @ self.matrix


@dataclass(frozen=True, eq=False)
class Scale:
    """Rows (``axis`` 0) or columns (1) ``span`` of a weight or bias are multiplied by ``factor``, one number each.

    What ``Rows`` or ``Columns`` do with diagonal matrices, for any number of heads that lie side by side.
    """

    span: slice
    factor: torch.Tensor
    axis: int

    def parts(self, tensor: torch.Tensor) -> Iterator[Part]:
        first, last = (self.span.start, self.span.stop) if self.axis == 0 else (0, len(tensor))
        step = max(1, BLOCK // max(1, tensor[:1].numel()))
        for begin in range(first, last, step):
            rows = slice(begin, min(begin + step, last))
            if self.axis == 0:
                place, factor = (rows,), self.factor[rows.start - first : rows.stop - first]
                factor = factor.view(-1, *(1,) * (tensor.dim() - 1))
            else:
                place, factor = (rows, self.span), self.factor
            yield place, tensor[place].double().mul_(factor)


@dataclass(frozen=True, eq=False)
class Gamma:
    """A norm's gamma = offset + weight is multiplied by ``factor``, of as many numbers as the weight."""

    factor: torch.Tensor
    offset: int

    def parts(self, tensor: torch.Tensor) -> Iterator[Part]:
        yield (), (tensor.double() + self.offset) * self.factor.view_as(tensor) - self.offset


Operation = Rows | Columns | Scale | Gamma


@torch.no_grad()
def fold(tensor: torch.Tensor, operations: Sequence[Operation], dtype: torch.dtype | None = None) -> torch.Tensor:
    """A folded copy of a tensor, in its own dtype or another.

    No two operations touch the same numbers, so each is rounded once. To 16 bits torch rounds by way of float32, so a
    copy in float32 that is rounded later has the same numbers.
    """
    folded = tensor.to(dtype or tensor.dtype, copy=True)
    for operation in operations:
        for place, part in operation.parts(tensor):
            folded[place] = part
    return folded
