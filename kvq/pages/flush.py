"""When a token is quantized: how many leading tokens are packed, as a function of the number of tokens alone.

Counts exclude the sinks. With ``n`` tokens stored, a side (keys or values) has packed

    blocks of tokens   unit * floor(n / unit),  unit = window, or the block if the window is 0     (KIVI keys, GEAR)
    single tokens      max(0, n - window)                                                           (KIVI values)

A query that is itself token n sees the state after the n - 1 tokens before it: KIVI packs after the step's attention.
"""

from dataclasses import dataclass
from typing import TypeVar

import torch

Count = TypeVar("Count", int, torch.Tensor)


@dataclass(frozen=True, kw_only=True)
class FlushRule:
    """One side's rule. ``unit`` 1 slides token by token; a larger unit flushes whole blocks."""

    window: int
    unit: int = 1
    sinks: int = 0

    def packed(self, stored: Count) -> Count:
        """Packed tokens once ``stored`` tokens (sinks included) are in the cache; one number or a tensor of them."""
        body = _positive(stored - self.sinks)
        return body // self.unit * self.unit if self.unit > 1 else _positive(body - self.window)

    # What the query at a position (0-based) reads when tokens arrive one by one.
    seen = packed

    @property
    def longest_tail(self) -> int:
        """Most exact tokens (sinks excluded) that a step of one token can hold."""
        return self.unit if self.unit > 1 else self.window + 1

    def longest(self, new: int) -> int:
        """Most exact tokens while ``new`` tokens arrive at once and what the step before released is not packed yet."""
        return (self.unit if self.unit > 1 else self.window) + 2 * new

    def flushed(self, new: int) -> int:
        """Most tokens that one step packs."""
        return max(self.unit, new) if self.unit > 1 else new


def _positive(count: Count) -> Count:
    return count.clamp_min(0) if isinstance(count, torch.Tensor) else max(0, count)
