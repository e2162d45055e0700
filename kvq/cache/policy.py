"""When a token is quantized: how many leading tokens are packed, as a function of the number of tokens alone.

Counts exclude the sinks. With ``n`` tokens stored, a side (keys or values) has packed

    blocks of tokens   unit * floor(n / unit),  unit = window, or the block if the window is 0     (KIVI keys, GEAR)
    single tokens      max(0, n - window)                                                           (KIVI values)

A query that is itself token n sees the state after the n - 1 tokens before it: KIVI packs after the step's attention.
"""

from dataclasses import dataclass

from kvq.codec_specs import CodecSpec
from kvq.specs import TokenPolicy


@dataclass(frozen=True, kw_only=True)
class FlushRule:
    """One side's rule. ``unit`` 1 slides token by token; a larger unit flushes whole blocks."""

    sinks: int
    window: int
    unit: int

    @classmethod
    def of(cls, spec: CodecSpec, tokens: TokenPolicy) -> "FlushRule":
        unit = (tokens.window or spec.block_tokens) if spec.block_tokens > 1 else 1
        return cls(sinks=tokens.sinks, window=tokens.window, unit=unit)

    def packed(self, stored: int) -> int:
        """Packed tokens once ``stored`` tokens (sinks included) are in the cache."""
        body = max(0, stored - self.sinks)
        if self.unit > 1:
            return body // self.unit * self.unit
        return max(0, body - self.window)

    def seen(self, position: int) -> int:
        """Packed tokens that the query at ``position`` (0-based) reads when tokens arrive one by one."""
        return self.packed(position)

    @property
    def longest_tail(self) -> int:
        """Most exact tokens (sinks excluded) that a step of one token can hold."""
        return self.unit if self.unit > 1 else self.window + 1
