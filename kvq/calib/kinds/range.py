"""What calibration keeps of a tensor: mergeable, padding-safe statistics by head and channel.

``observe`` measures one tensor, ``merge`` joins two measurements as if their tokens had been seen together. A kind of
statistic is one frozen class with these two operations, so batches, resumed runs and processes join the same way.

Shape letters: B batch, K key/value heads, T tokens, D head dim.
"""

import contextlib
from dataclasses import dataclass, fields

import torch

# Tensors up to this many numbers are measured on one thread (about 10 ms at the limit).
SERIAL_NUMBERS = 2**22


@dataclass(frozen=True, kw_only=True)
class ChannelStats:
    """Range and first two moments by head and channel.

    min, max           [K, D] float32; +inf and -inf when nothing was seen. NaN and Inf in the data show up here.
    sum, sum_squares   [K, D] float64; a batch is summed in float32 (float64 for float64 data) along its tokens.
    count              tokens seen, the same for every head and channel.
    """

    min: torch.Tensor
    max: torch.Tensor
    sum: torch.Tensor
    sum_squares: torch.Tensor
    count: int

    @property
    def absmax(self) -> torch.Tensor:
        """Largest magnitude, [K, D] float32; 0 when nothing was seen."""
        return torch.maximum(-self.min, self.max).clamp(min=0)

    @property
    def mean(self) -> torch.Tensor:
        """[K, D] float32; NaN when nothing was seen."""
        return (self.sum / self.count if self.count else self.sum / float("nan")).float()

    @property
    def rms(self) -> torch.Tensor:
        """Root of the mean square, [K, D] float32; NaN when nothing was seen."""
        return (self.sum_squares / self.count if self.count else self.sum_squares / float("nan")).sqrt().float()

    @property
    def is_finite(self) -> bool:
        """False if any number seen was NaN or Inf."""
        return bool((self.sum.isfinite() & self.min.isfinite() & self.max.isfinite()).all()) or not self.count

    def merge(self, other: "ChannelStats") -> "ChannelStats":
        """Statistics of both token sets together."""
        return ChannelStats(
            min=torch.minimum(self.min, other.min),
            max=torch.maximum(self.max, other.max),
            sum=self.sum + other.sum,
            sum_squares=self.sum_squares + other.sum_squares,
            count=self.count + other.count,
        )

    def cpu(self) -> "ChannelStats":
        tensors = {f.name: getattr(self, f.name).cpu() for f in fields(self) if f.name != "count"}
        return ChannelStats(**tensors, count=self.count)


def observe(x: torch.Tensor, valid: torch.Tensor | None = None) -> ChannelStats:
    """Measure keys or values [B, K, T, D] of any float dtype.

    valid   bool [B, T], False for padding; None counts every token.
    """
    if valid is not None:
        # [B, K, T, D] -> [1, K, valid tokens, D]; padding never enters a reduction, so it may even be NaN.
        x = x.transpose(1, 2)[valid].transpose(0, 1).unsqueeze(0)
    batch, heads, tokens, channels = x.shape
    if not batch * tokens:
        return _nothing_seen(heads, channels, x.device)
    partial = torch.float64 if x.dtype == torch.float64 else torch.float32
    with _few_threads(x):
        # Vectorised passes: on the CPU, aminmax and vector_norm along this axis are not, and take six times as long.
        # The squares need one float copy of x, which is freed at once.
        squares = x.to(partial, copy=True).square_()
        return ChannelStats(
            min=x.amin(2).amin(0).float(),
            max=x.amax(2).amax(0).float(),
            sum=x.sum(2, dtype=partial).double().sum(0),
            sum_squares=squares.sum(2).double().sum(0),
            count=batch * tokens,
        )


@contextlib.contextmanager
def _few_threads(x: torch.Tensor):
    # Each of these passes takes a tenth of a millisecond on one thread. Starting all threads for it gains nothing, and
    # on a busy machine every start waits for the scheduler, which made calibration a fifth slower than plain forwards.
    threads = torch.get_num_threads()
    if x.device.type != "cpu" or x.numel() > SERIAL_NUMBERS or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _nothing_seen(heads: int, channels: int, device: torch.device) -> ChannelStats:
    infinity = torch.full((heads, channels), float("inf"), device=device)
    zero = torch.zeros(heads, channels, dtype=torch.float64, device=device)
    return ChannelStats(min=infinity, max=-infinity, sum=zero, sum_squares=zero.clone(), count=0)
