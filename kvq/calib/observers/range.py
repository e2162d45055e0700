"""Range and first two moments of every head and channel."""

from dataclasses import dataclass, field

import torch

from kvq.calib.observers.base import LARGEST, SMALLEST, Statistic
from kvq.calib.observers.compiled import channel_range, compiles


@dataclass(frozen=True, kw_only=True)
class Range(Statistic):
    """Range and first two moments by head and channel.

    min, max           [K, D] float32; +inf and -inf when nothing was seen. NaN and Inf in the data show up here.
    sum, sum_squares   [K, D] float64; torch sums a batch in float32 (float64 for float64 data) along its tokens.
    count              tokens seen, the same for every head and channel.
    """

    min: torch.Tensor = field(metadata=SMALLEST)
    max: torch.Tensor = field(metadata=LARGEST)
    sum: torch.Tensor
    sum_squares: torch.Tensor
    count: int

    @classmethod
    def observe(cls, x: torch.Tensor) -> "Range":
        """Measure x [B, K, T, D] of any float dtype; padding is left out before (``real_tokens``)."""
        batch, heads, tokens, channels = x.shape
        if not batch * tokens:
            return _nothing_seen(heads, channels, x.device)
        if compiles(x):
            low, high, total, squares = channel_range(x)
            return cls(min=low, max=high, sum=total, sum_squares=squares, count=batch * tokens)
        partial = torch.float64 if x.dtype == torch.float64 else torch.float32
        # Vectorised passes: on the CPU, aminmax and vector_norm along this axis are not, and take six times as
        # long. Squares are formed row by row, so that they stay in the cache.
        squares = torch.stack([row.to(partial).square().sum(1) for row in x])
        return cls(
            min=x.amin(2).amin(0).float(),
            max=x.amax(2).amax(0).float(),
            sum=x.sum(2, dtype=partial).double().sum(0),
            sum_squares=squares.double().sum(0),
            count=batch * tokens,
        )

    @property
    def absmax(self) -> torch.Tensor:
        """Largest magnitude, [K, D] float32; 0 when nothing was seen."""
        return torch.maximum(-self.min, self.max).clamp(min=0)

    @property
    def mean(self) -> torch.Tensor:
        """[K, D] float32; NaN when nothing was seen."""
        return (self.sum / self._tokens).float()

    @property
    def rms(self) -> torch.Tensor:
        """Root of the mean square, [K, D] float32; NaN when nothing was seen."""
        return (self.sum_squares / self._tokens).sqrt().float()

    @property
    def std(self) -> torch.Tensor:
        """Standard deviation, [K, D] float32; NaN when nothing was seen."""
        mean = self.sum / self._tokens
        return (self.sum_squares / self._tokens - mean.square()).clamp(min=0).sqrt().float()

    @property
    def _tokens(self) -> float:
        return self.count or float("nan")

    def grouped(self, kv_heads: int) -> "Range":
        """From query heads [H, D] to the KV heads that they read, [K, D]: a group's heads count as more tokens."""
        low, high, total, squares = (
            x.unflatten(0, (kv_heads, -1)) for x in (self.min, self.max, self.sum, self.sum_squares)
        )
        return Range(
            min=low.amin(1), max=high.amax(1), sum=total.sum(1), sum_squares=squares.sum(1),
            count=self.count * low.shape[1],
        )  # fmt: skip

    def tensors(self) -> dict[str, torch.Tensor]:
        # absmax follows from min and max and is stored for other readers.
        return super().tensors() | {"absmax": self.absmax}


def _nothing_seen(heads: int, channels: int, device: torch.device) -> Range:
    infinity = torch.full((heads, channels), float("inf"), device=device)
    zero = torch.zeros(heads, channels, dtype=torch.float64, device=device)
    return Range(min=infinity, max=-infinity, sum=zero, sum_squares=zero.clone(), count=0)
