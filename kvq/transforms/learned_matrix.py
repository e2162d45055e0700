"""An invertible matrix by KV head, U diag(exp(l)) V^T with U and V by the Cayley transform, under Adam.

FlatQuant (arXiv 2410.09426); AffineQuant (arXiv 2403.12544).
"""

import torch

from kvq.transforms.cayley import cayley
from kvq.transforms.fit_data import FitData
from kvq.transforms.learned import Adam, Dense, LearnedSpec
from kvq.transforms.spec import MATRIX, register_transform
from kvq.transforms.steps import Matrix


class MatrixInTheMaking(Adam):
    def __init__(self, data: FitData):
        heads, size = data.heads, len(data.partner)
        super().__init__(
            [torch.zeros(heads, size, size), torch.zeros(heads, size, size), torch.zeros(heads, size)], 0.005
        )

    def _factors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        left, right, logs = self.parameters
        u, v = (cayley(p - p.transpose(-1, -2)) for p in (left, right))
        return u, v.transpose(-1, -2), logs.unsqueeze(-1)

    def step(self) -> Dense:
        u, v, logs = self._factors()
        return Dense(u @ (logs.exp() * v), v.transpose(-1, -2) @ ((-logs).exp() * u.transpose(-1, -2)))

    def numbers(self) -> dict[str, torch.Tensor]:
        return {"matrix": self.step().matrix}


@register_transform("learned_matrix")
class LearnedMatrixSpec(LearnedSpec):
    """An invertible matrix."""

    tensors = MATRIX
    mixes_channels = True

    def learnable(self, data: FitData) -> MatrixInTheMaking:
        return MatrixInTheMaking(data)

    def build(self, head_dim, tensors) -> Matrix:
        return Matrix(tensors["matrix"])
