"""Numbers between -1 and 1 in even bins, counted and weighted: what a codebook is learned from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

# The levels of a 4-bit codebook are some thirty bins apart.
BINS = 512


@dataclass(frozen=True, kw_only=True)
class Bins:
    """counts, weights   [BINS] float64: numbers by bin, and their weights."""

    counts: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def observe(cls, x: torch.Tensor, weights: torch.Tensor | None = None) -> "Bins":
        """Count numbers of any shape; NaN and what lies beyond the ends by more than rounding is left out."""
        inside = x.abs() <= 1 + 1e-3
        numbers = x[inside].double()
        index = ((numbers + 1) * (BINS / 2)).long().clamp(0, BINS - 1)
        counts = torch.bincount(index, minlength=BINS).double()
        if weights is None:
            return cls(counts=counts, weights=torch.zeros_like(counts))
        return cls(counts=counts, weights=torch.bincount(index, weights[inside].double(), minlength=BINS))

    @property
    def is_finite(self) -> bool:
        return bool(self.weights.isfinite().all())

    def merge(self, other: "Bins") -> "Bins":
        return Bins(counts=self.counts + other.counts, weights=self.weights + other.weights)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"counts": self.counts, "weights": self.weights}

    def facts(self) -> dict[str, Any]:
        return {}

    @classmethod
    def restore(cls, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> "Bins":
        return cls(counts=tensors["counts"], weights=tensors["weights"])


def bin_middles() -> torch.Tensor:
    """What the numbers of a bin are taken for, [BINS] float64."""
    return (torch.arange(BINS, dtype=torch.float64) + 0.5) * (2 / BINS) - 1
