"""Vectors of heads times their matrices in C++, for the few tokens of a step."""

import torch

from kvq.kernels.cpp import build
from kvq.pages.layout import ATOM

# More vectors than these are torch's: its products of large matrices are faster.
MOST_VECTORS = 16


def serves(x: torch.Tensor) -> bool:
    """Whether ``product`` takes x [B, K, M, D]."""
    few = x.shape[0] * x.shape[2] <= MOST_VECTORS and x.shape[3] % ATOM == 0 and x.stride(3) == 1
    return few and x.device.type == "cpu" and not x.requires_grad and build.unavailable() is None


def product(x: torch.Tensor, matrix: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
    """x [B, K, M, D] of any dtype times matrix [K, D, D] plus offset [K, 1, D], in the matrix's dtype, rounded once."""
    out = torch.empty(x.shape, dtype=matrix.dtype)
    torch.ops.kvq.product(x, matrix, offset, out)
    return out.to(x.dtype)
