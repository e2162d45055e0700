"""Normalised numbers in even bins, counted and weighted: what a codebook is learned from."""

from dataclasses import dataclass

import torch

from kvq.calib.observers.base import Statistic

# Static ranges may be quantiles, and a token has room for so many outliers only: what lies outside a range and is no
# outlier counts as well. The levels of a 4-bit codebook are some thirty bins apart.
BINS, END = 1024, 2.0


@dataclass(frozen=True, kw_only=True)
class Bins(Statistic):
    """counts, weights   [BINS] float64: numbers by bin, and their weights."""

    counts: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def observe(cls, x: torch.Tensor, weights: torch.Tensor | None = None) -> "Bins":
        """Count numbers of any shape; NaN is left out, and the outermost bins hold what lies beyond END."""
        inside = ~x.isnan()
        numbers = x[inside].double().clamp(-END, END)
        index = ((numbers + END) * (BINS / (2 * END))).long().clamp(0, BINS - 1)
        counts = torch.bincount(index, minlength=BINS).double()
        if weights is None:
            return cls(counts=counts, weights=torch.zeros_like(counts))
        return cls(counts=counts, weights=torch.bincount(index, weights[inside].double(), minlength=BINS))


def bin_middles() -> torch.Tensor:
    """What the numbers of a bin are taken for, [BINS] float64."""
    return (torch.arange(BINS, dtype=torch.float64) + 0.5) * (2 * END / BINS) - END
