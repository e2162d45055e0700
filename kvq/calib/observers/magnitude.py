"""Number magnitudes by their leading bits: bins spaced like floating-point numbers, the same everywhere.

A magnitude's number is its exponent and first mantissa bits, read as one integer, counted from 1 at 2^lowest; what is
smaller has number 0, what is 2^highest or more the last. So counts join to the bit in any order, and numbering takes
three integer operations.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class MagnitudeBins:
    """2^mantissa bins for each octave from 2^lowest to 2^highest, and one for what is smaller."""

    lowest: int
    highest: int
    mantissa: int

    @property
    def levels(self) -> int:
        """Number of the last bin."""
        return (self.highest - self.lowest) << self.mantissa

    @property
    def integers(self) -> tuple[int, int, int]:
        """first, shift, levels: |x| has number (bits >> shift) - first, and no less than 0 nor more than levels."""
        return ((127 + self.lowest) << self.mantissa) - 1, 23 - self.mantissa, self.levels

    def number(self, x: torch.Tensor) -> torch.Tensor:
        """Bins of |x|, int32 of x's shape; infinity and NaN are in the last."""
        first, shift, levels = self.integers
        bits = x.float().contiguous().view(torch.int32)
        return (bits & 0x7FFFFFFF).bitwise_right_shift_(shift).sub_(first).clamp_(0, levels)

    def edges(self) -> torch.Tensor:
        """Lower edges of bins 1 to levels, and 2^highest: levels + 1 ascending numbers, float64."""
        octaves = torch.arange(self.lowest, self.highest, dtype=torch.float64).exp2()
        steps = 1 + torch.arange(1 << self.mantissa, dtype=torch.float64) / (1 << self.mantissa)
        return torch.cat([torch.outer(octaves, steps).flatten(), torch.tensor([2.0**self.highest]).double()])
