"""Orthonormal Hadamard matrices, for every order that has a construction here.

A matrix of order n = K * 2^m is the Kronecker product of one of order K and Sylvester's of order 2^m. Orders K come
from Paley: with the quadratic character of a field of q elements (R. Paley, "On orthogonal matrices", 1933),

    q = 3 mod 4:  order q + 1          q = 1 mod 4:  order 2 (q + 1)

q a prime or the square of one. That covers 12, 20, 28, 36, 44, 52, ... and so every head dimension in use (64, 80, 96,
112, 128, 160, 192, 256, 512, 576); 92, 116, 156, 172 and 188 are among the few orders that it does not.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from kvq.shapes import Float64, checked


@lru_cache(maxsize=32)
@checked
def hadamard_matrix(order: int) -> Float64[Tensor, "{order} {order}"]:
    """The orthonormal Hadamard matrix of an order, float64 [order, order]; symmetric for powers of two.

    Raises ValueError for an order that has no construction here.
    """
    core = _core(order)
    if core is None:
        raise ValueError(f"no Hadamard matrix of order {order} is known: use a power of two, or 12, 20, 28, ... of it.")
    matrix = torch.ones(1, 1, dtype=torch.float64) if core == 1 else _paley(core)
    while len(matrix) < order:
        # Kronecker from the right, so that Sylvester's part runs over neighbouring channels.
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    return matrix / order**0.5


def known_order(order: int) -> bool:
    """True if ``hadamard_matrix`` knows the order."""
    return _core(order) is not None


def _core(order: int) -> int | None:
    """The smallest K with order = K * 2^m that is 1 or Paley's; None if there is none."""
    if order < 1:
        return None
    core = order // (order & -order)
    while core <= order:
        if core == 1 or _field(core - 1, 3) or (core % 2 == 0 and _field(core // 2 - 1, 1)):
            return core
        core *= 2
    return None


def _field(q: int, residue: int) -> bool:
    """True if q is a prime or its square, and ``residue`` mod 4."""
    root = math.isqrt(q)
    return q > 2 and q % 4 == residue and (_prime(q) or (root * root == q and _prime(root)))


def _prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def _paley(order: int) -> torch.Tensor:
    """Paley's matrix of order q + 1 (q = 3 mod 4) or 2 (q + 1) (q = 1 mod 4), entries +-1."""
    if _field(order - 1, 3):
        chi = _character(order - 1)
        bordered = torch.zeros(order, order, dtype=torch.float64)
        bordered[0, 1:], bordered[1:, 0], bordered[1:, 1:] = 1, -1, chi
        return bordered + torch.eye(order, dtype=torch.float64)
    half = order // 2
    bordered = torch.zeros(half, half, dtype=torch.float64)
    bordered[0, 1:], bordered[1:, 0], bordered[1:, 1:] = 1, 1, _character(half - 1)
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    return torch.kron(bordered, signs) + torch.kron(
        torch.eye(half, dtype=torch.float64), torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    )


def _character(q: int) -> torch.Tensor:
    """chi(a - b) for all a, b of the field of q elements: 1 for squares, -1 for others, 0 for 0; float64 [q, q]."""
    p = q if _prime(q) else math.isqrt(q)
    squares = {x * x % p for x in range(1, p)}
    if p == q:
        values = torch.tensor([0] + [1 if x in squares else -1 for x in range(1, p)], dtype=torch.float64)
        index = torch.arange(p)
        return values[(index[:, None] - index[None]) % p]
    # x + y w with w^2 = r, no square: an element is a square if its norm x^2 - r y^2 is one in the field of p.
    r = next(x for x in range(2, p) if x not in squares)
    x, y = torch.arange(q) // p, torch.arange(q) % p
    norm = ((x[:, None] - x[None]) ** 2 - r * (y[:, None] - y[None]) ** 2) % p
    values = torch.tensor([0] + [1 if n in squares else -1 for n in range(1, p)], dtype=torch.float64)
    return values[norm]
