"""Quantiles of every head and channel, from a histogram whose bins are the same everywhere."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kvq.calib.observers.base import Statistic
from kvq.calib.observers.compiled import compiles, count_signed
from kvq.calib.observers.magnitude import MagnitudeBins
from kvq.errors import DataError

# Eight to an octave, so that a bin is at most an eighth of its magnitude wide.
MAGNITUDES = MagnitudeBins(lowest=-12, highest=14, mantissa=3)
LEVELS = MAGNITUDES.levels
# Negative numbers mirror the positive ones; bin LEVELS holds what is about 0.
BINS = 2 * LEVELS + 1


@dataclass(frozen=True, kw_only=True)
class Histogram(Statistic):
    """counts   [K, D, BINS] int32: tokens by bin, from most negative to largest."""

    counts: torch.Tensor

    @classmethod
    def observe(cls, x: torch.Tensor) -> "Histogram":
        """Count x [B, K, T, D] of any float dtype (as float32); padding is left out before."""
        _, heads, _, channels = x.shape
        if not x.numel():
            return cls(counts=torch.zeros(heads, channels, BINS, dtype=torch.int32, device=x.device))
        if compiles(x):
            return cls(counts=count_signed(x, MAGNITUDES))
        x = x.float().contiguous()
        bins = MAGNITUDES.number(x)
        # The sign bit, shifted down, is 0 or -1; this makes it 1 or -1.
        bins *= x.view(torch.int32).bitwise_right_shift(31).bitwise_or_(1)
        place = torch.arange(heads * channels, device=x.device, dtype=torch.int32).view(heads, 1, channels)
        bins += place * BINS + LEVELS
        counts = torch.bincount(bins.flatten(), minlength=heads * channels * BINS)
        return cls(counts=counts.to(torch.int32).view(heads, channels, BINS))

    @property
    def count(self) -> int:
        """Tokens seen."""
        return int(self.counts[0, 0].sum())

    def quantile(self, q: float) -> torch.Tensor:
        """The q-quantile of every head and channel, [K, D] float32, 0 <= q <= 1; NaN when nothing was seen.

        Interpolated inside a bin, which is at most an eighth of its magnitude wide.
        """
        if not 0 <= q <= 1:
            raise DataError(f"quantile {q} is no share: use a number from 0 to 1.")
        edges = bin_edges().to(self.counts.device)
        below = self.counts.double().cumsum(-1)
        total = below[..., -1:]
        # The first bin by which the wanted number of tokens is reached; an empty bin is never it.
        wanted = (q * total).clamp(min=0.5)
        index = (below < wanted).sum(-1, keepdim=True).clamp(max=BINS - 1)
        inside = self.counts.double().gather(-1, index)
        before = below.gather(-1, index) - inside
        low, high = edges[index], edges[index + 1]
        value = low + (high - low) * ((q * total - before) / inside).clamp(0, 1)
        return torch.where(total > 0, value, float("nan")).squeeze(-1).float()

    def merge(self, other: "Histogram") -> "Histogram":
        """Counts of both token sets together."""
        joined = super().merge(other)
        if bool((joined.counts < 0).any()):
            raise DataError("a histogram counts up to 2,147,483,647 tokens: calibrate on fewer.")
        return joined

    def grouped(self, kv_heads: int) -> "Histogram":
        """From query heads [H, D, BINS] to the KV heads that they read: a group's heads count as more tokens."""
        return Histogram(counts=self.counts.unflatten(0, (kv_heads, -1)).sum(1, dtype=torch.int32))

    def tensors(self) -> dict[str, torch.Tensor]:
        first, last = self._used()
        return {"counts": self.counts[..., first:last].contiguous()}

    def facts(self) -> dict[str, Any]:
        return {"first_bin": self._used()[0]}

    def _used(self) -> tuple[int, int]:
        """First bin that holds anything in any channel, and the one after the last; the rest is not stored."""
        used = self.counts.flatten(0, 1).any(0).nonzero().flatten()
        return (int(used[0]), int(used[-1]) + 1) if len(used) else (LEVELS, LEVELS + 1)

    @classmethod
    def restore(cls, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> "Histogram":
        stored, first = tensors["counts"], facts["first_bin"]
        counts = torch.zeros(*stored.shape[:2], BINS, dtype=torch.int32)
        counts[..., first : first + stored.shape[-1]] = stored
        return cls(counts=counts)


def bin_edges() -> torch.Tensor:
    """The BINS + 1 edges of the bins, ascending, float64; the outermost bins hold what lies beyond, too."""
    positive = MAGNITUDES.edges()
    return torch.cat([-positive.flip(0), positive])
