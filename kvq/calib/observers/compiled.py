"""Statistics measured in C++ (``kvq/kernels/cpp/statistics.h``), on the CPU, if that can be built.

Counts, minima and maxima are those of the torch code to the bit; sums are taken in float64 instead of float32.
"""

import torch

from kvq.calib.observers.magnitude import MagnitudeBins
from kvq.kernels.cpp.build import unavailable


def compiles(x: torch.Tensor) -> bool:
    """False where torch measures x: on other devices, in float64, and without the C++ kernels."""
    return x.device.type == "cpu" and x.dtype != torch.float64 and unavailable() is None


def channel_range(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Minima and maxima float32 [K, D], sums and sums of squares float64 [K, D] of x [B, K, T, D]."""
    rows, groups = _columns(x)
    places = groups, rows.shape[2]
    infinity = torch.full(places, float("inf"))
    found = infinity, -infinity, torch.zeros(places, dtype=torch.float64), torch.zeros(places, dtype=torch.float64)
    torch.ops.kvq.channel_range(rows, *found)
    return tuple(part.view(x.shape[1], x.shape[3]) for part in found)


def count_signed(x: torch.Tensor, bins: MagnitudeBins) -> torch.Tensor:
    """Numbers of x [B, K, T, D] by sign and bin, int32 [K, D, 2 * levels + 1]."""
    rows, groups = _columns(x)
    counts = torch.zeros(groups, rows.shape[2], 2 * bins.levels + 1, dtype=torch.int32)
    torch.ops.kvq.count_signed(rows, bins.integers, counts)
    return counts.view(x.shape[1], x.shape[3], -1)


def peaks(
    hidden: torch.Tensor, valid: torch.Tensor | None, bins: MagnitudeBins, stride: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Largest magnitudes of channels [C] and of tokens [B, T], float32, and magnitudes counted, int64 [levels + 1].

    Of hidden [B, T, C]; ``valid`` bool [B, T] or None; every ``stride``-th channel is counted.
    """
    rows = hidden.detach().float().contiguous()
    real = torch.ones(rows.shape[:2], dtype=torch.bool) if valid is None else valid.contiguous()
    tokens = torch.zeros(rows.shape[:2], dtype=torch.int32)
    channels = torch.zeros(len(rows), rows.shape[2], dtype=torch.int32)
    counts = torch.zeros(len(rows), bins.levels + 1, dtype=torch.int64)
    torch.ops.kvq.massive(rows, real, bins.integers, stride, tokens, channels, counts)
    return channels.amax(0).view(torch.float32), tokens.view(torch.float32), counts.sum(0)


def _columns(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """x [B, K, T, D] as float32 [N, T, C], and R: without a copy if heads or tokens are in order.

    The channels of all groups, [R, C], are those of all heads, [K, D].
    """
    x = x.detach().float()
    by_token = x.transpose(1, 2)
    if by_token.is_contiguous():
        return by_token.flatten(2), 1
    return x.contiguous().flatten(0, 1), x.shape[1]
