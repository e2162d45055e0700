"""Levels of static codebooks, and where one ends and the next begins. All tables are float64, ascending.

lloyd_max     minimum mean squared error for N(0, 1) (Lloyd 1982, Max 1960)
normal_float  quantiles of N(0, 1) with an exact zero (QLoRA, arXiv 2305.14314, equation 4)
uniform       evenly spaced from -1 to 1
even          evenly spaced, minimum mean squared error for N(0, 1) (Max 1960): at 2 bits 1.2% above that of lloyd_max,
              and kernels read such codes without a table
"""

import math
from functools import lru_cache

import torch

NAMED_LEVELS = ("lloyd_max", "normal_float", "uniform", "even")
_TOLERANCE = 1e-13


def make_levels(name: str, bits: int, unit_range: bool) -> torch.Tensor:
    """The 2^bits levels of a named codebook; ``unit_range`` scales them so that the largest magnitude is 1.

    Without it, all but ``uniform`` are for numbers of variance 1.
    """
    named = {"lloyd_max": lloyd_max, "normal_float": normal_float, "uniform": uniform, "even": even}
    levels = named[name](bits)
    return levels / levels.abs().max() if unit_range else levels


def midpoints(levels: torch.Tensor) -> torch.Tensor:
    """Edges [n - 1] by which a number goes to its nearest level."""
    return (levels[1:] + levels[:-1]) / 2


def uniform(bits: int) -> torch.Tensor:
    return torch.linspace(-1, 1, 2**bits, dtype=torch.float64)


@lru_cache(maxsize=8)
def lloyd_max(bits: int) -> torch.Tensor:
    """Fixed point of: an edge is the middle of its levels, a level the mean of the normal numbers between its edges."""
    # Only the upper half is iterated; the other half mirrors it.
    upper = torch.linspace(0.1, 3, 2 ** (bits - 1), dtype=torch.float64)
    while True:
        edges = torch.cat([torch.zeros(1, dtype=torch.float64), midpoints(upper)])
        density = torch.cat([torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi), edges.new_zeros(1)])
        tail = torch.cat([torch.special.erfc(edges / math.sqrt(2)) / 2, edges.new_zeros(1)])
        fresh = (density[:-1] - density[1:]) / (tail[:-1] - tail[1:])
        if (fresh - upper).abs().max() < _TOLERANCE:
            return torch.cat([-fresh.flip(0), fresh])
        upper = fresh


@lru_cache(maxsize=8)
def even(bits: int) -> torch.Tensor:
    """Fixed point of: the distance of levels is the one that is best for how numbers are given to them."""
    codes = torch.arange(2**bits, dtype=torch.float64) - (2**bits - 1) / 2
    step = 2.0 / 2 ** (bits - 1)
    while True:
        edges = midpoints(codes) * step
        ends = torch.cat([edges.new_tensor([-torch.inf]), edges, edges.new_tensor([torch.inf])])
        density = torch.exp(-ends.square() / 2) / math.sqrt(2 * math.pi)
        share = torch.special.ndtr(ends).diff()
        # E[x c] / E[c^2], c the code that x gets.
        fresh = float((codes * (density[:-1] - density[1:])).sum() / (codes.square() * share).sum())
        if abs(fresh - step) < _TOLERANCE:
            return codes * fresh
        step = fresh


@lru_cache(maxsize=8)
def normal_float(bits: int) -> torch.Tensor:
    """2^(bits-1) - 1 evenly spaced quantiles below zero, zero, and 2^(bits-1) above it."""
    half = 2 ** (bits - 1)
    offset = 1 - (1 / (4 * half) + 1 / (2 * (2 * half - 1))) / 2
    positive = torch.special.ndtri(torch.linspace(offset, 0.5, half + 1, dtype=torch.float64)[:-1]).flip(0)
    negative = -torch.special.ndtri(torch.linspace(offset, 0.5, half, dtype=torch.float64)[:-1])
    return torch.cat([negative, torch.zeros(1, dtype=torch.float64), positive])
