"""Orthonormal Hadamard rotations of channels (QuaRot, arXiv 2404.00456), of every order that has a matrix here."""

from dataclasses import dataclass
from functools import lru_cache

import torch

from kvq.errors import RecipeError
from kvq.settings import check_seed, is_count
from kvq.transforms.chain import Step
from kvq.transforms.hadamard_matrix import hadamard_matrix, known_order
from kvq.transforms.spec import TransformSpec, register_transform

# Above this order a product of two smaller matrices is faster than one large one (benchmarks/hadamard.py).
DENSE_ORDER = 256


@dataclass(frozen=True, kw_only=True)
class Hadamard(Step):
    """x -> (x * signs) H, block by block, with H orthonormal (entries +-1 / sqrt(block)).

    block   channels rotated together, an order that ``hadamard_matrix`` knows; the head dimension is a multiple of it.
    seed    seed of the random signs; None: no signs.
    """

    block: int
    seed: int | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate keys, values or queries [..., D]."""
        blocks = x.unflatten(-1, (-1, self.block))
        return rotate(blocks if self.seed is None else blocks * self._signs(x)).flatten(-2)

    # A rotation is its own dual: (q H)(k H)^T = q k^T.
    transform_query = forward

    def inverse(self, x: torch.Tensor) -> torch.Tensor:
        """Inverse of ``forward``."""
        blocks = rotate(x.unflatten(-1, (-1, self.block)), inverse=True)
        return (blocks if self.seed is None else blocks * self._signs(x)).flatten(-2)

    def _signs(self, x: torch.Tensor) -> torch.Tensor:
        return _signs(x.shape[-1], self.seed, x.dtype, x.device).view(-1, self.block)


def rotate(x: torch.Tensor, inverse: bool = False) -> torch.Tensor:
    """x [..., n] times the orthonormal Hadamard matrix of order n (transposed: the inverse)."""
    order = x.shape[-1]
    if order <= DENSE_ORDER:
        matrix = _matrix(order, x.dtype, x.device)
        return x @ (matrix.T if inverse else matrix)
    # (A kron B): rows of x [a, b] become A^T x B.
    size = 1 << ((order & -order).bit_length() - 1) // 2
    size = size if known_order(order // size) else order & -order
    first, second = (_matrix(n, x.dtype, x.device) for n in (order // size, size))
    if inverse:
        first, second = first.T, second.T
    return (first.T @ (x.unflatten(-1, (-1, size)) @ second)).flatten(-2)


@lru_cache(maxsize=32)
def _matrix(order: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    # A forward in inference mode must not leave a tensor that training cannot use.
    with torch.inference_mode(False):
        return hadamard_matrix(order).to(device, dtype)


@lru_cache(maxsize=32)
def _signs(count: int, seed: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        drawn = torch.randint(0, 2, (count,), generator=torch.Generator().manual_seed(seed), device="cpu") * 2 - 1
        return drawn.to(device, dtype)


@register_transform("hadamard")
@dataclass(frozen=True, kw_only=True)
class HadamardSpec(TransformSpec):
    """A Hadamard rotation of every head, scaled to be orthonormal (QuaRot, arXiv 2404.00456).

    block   rotate blocks of so many channels instead of the whole head.
    seed    flip the signs of channels first, chosen by this seed.
    """

    block: int | None = None
    seed: int | None = None

    mixes_channels = True

    def check(self) -> None:
        if self.block is not None and not is_count(self.block):
            raise RecipeError(f"block={self.block!r} is not a number of channels: use 16, 32, 64, ...")
        check_seed("seed", self.seed)

    def build(self, head_dim, tensors) -> Hadamard:
        block = self.block or head_dim
        if head_dim % block or not known_order(block):
            fits = [b for b in range(head_dim, 1, -1) if head_dim % b == 0 and known_order(b)]
            raise RecipeError(
                f"hadamard block={block} does not fit head_dim={head_dim}: use {', '.join(map(str, fits[:3]))}, blocks "
                "for which a Hadamard matrix is known."
            )
        return Hadamard(block=block, seed=self.seed)
