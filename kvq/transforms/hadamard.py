"""Orthonormal Hadamard rotations of channels (QuaRot, arXiv 2404.00456)."""

from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True, kw_only=True)
class Hadamard:
    """x -> (x * signs) H, block by block, with H orthonormal (entries +-1 / sqrt(block)).

    block   channels rotated together, an order that ``hadamard_matrix`` knows; the head dimension is a multiple of it.
    seed    seed of the random signs; None: no signs.
    """

    block: int
    seed: int | None = None

    def write(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate keys, values or queries [..., D]."""
        blocks = x.unflatten(-1, (-1, self.block))
        if self.seed is not None:
            blocks = blocks * _signs(x.shape[-1], self.seed).to(x).view(-1, self.block)
        return _transform(blocks).flatten(-2)

    # A rotation is its own dual: (q H)(k H)^T = q k^T.
    dual = write

    def undo(self, x: torch.Tensor) -> torch.Tensor:
        """Inverse of ``write``."""
        blocks = _transform(x.unflatten(-1, (-1, self.block)), inverse=True)
        if self.seed is not None:
            blocks = blocks * _signs(x.shape[-1], self.seed).to(x).view(-1, self.block)
        return blocks.flatten(-2)


def _transform(x: torch.Tensor, inverse: bool = False) -> torch.Tensor:
    """x [..., n] times the orthonormal Hadamard matrix of order n (transposed: the inverse)."""
    matrix = hadamard_matrix(x.shape[-1]).to(x)
    return x @ (matrix.T if inverse else matrix)


@lru_cache(maxsize=32)
def hadamard_matrix(order: int) -> torch.Tensor:
    """The orthonormal Hadamard matrix of a power of two (Sylvester), float64 [order, order].

    Raises ValueError for any other order.
    """
    if order < 1 or order & (order - 1):
        raise ValueError(f"no Hadamard matrix of order {order} is known: use a power of two.")
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / order**0.5


@lru_cache(maxsize=32)
def _signs(count: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 2, (count,), generator=torch.Generator().manual_seed(seed)) * 2 - 1
