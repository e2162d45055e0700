"""Massive activations: a few hidden-state entries thousands of times larger than the rest (arXiv 2402.17762).

They sit on fixed channels of a few tokens, make these tokens attention sinks, and give them keys and values unlike all
others. Measured on what enters a decoder layer.
"""

from dataclasses import dataclass, field

import torch

from kvq.calib.observers.base import LARGEST, Statistic
from kvq.calib.observers.compiled import compiles, peaks
from kvq.calib.observers.magnitude import MagnitudeBins
from kvq.calib.observers.tops import Tops

# The paper's rule: above 100, and about 1,000 times the median magnitude of the hidden state.
FLOOR, RATIO = 100.0, 1000.0
# Four bins to an octave.
BINS = MagnitudeBins(lowest=-16, highest=24, mantissa=2)
# Every eighth channel is enough for a median, and its histogram costs an eighth.
_STRIDE = 8


@dataclass(frozen=True, kw_only=True)
class Massive(Statistic):
    """channel_peak   [C] float32: largest magnitude of each hidden channel.
    magnitudes     int64 [BINS.levels + 1]: histogram of |h| over every eighth channel of every token.
    token_peaks    int64, likewise: histogram of each token's largest magnitude.
    tops           the tokens with the largest entries; ``extra`` is the channel.
    """

    channel_peak: torch.Tensor = field(metadata=LARGEST)
    magnitudes: torch.Tensor
    token_peaks: torch.Tensor
    tops: Tops

    @classmethod
    def observe(
        cls, hidden: torch.Tensor, tokens: torch.Tensor, valid: torch.Tensor | None, priority: torch.Tensor
    ) -> "Massive":
        """Measure hidden [B, T, C] of tokens [B, T]."""

        def channel(place: torch.Tensor) -> torch.Tensor:
            index = place.to(hidden.device).unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
            return hidden.gather(1, index).abs().argmax(-1)

        compiled = compiles(hidden)
        channels, peak, magnitudes = peaks(hidden, valid, BINS, _STRIDE) if compiled else _by_torch(hidden, valid)
        return cls(
            channel_peak=channels,
            magnitudes=magnitudes,
            token_peaks=_counts(peak if valid is None else peak[valid]),
            tops=Tops.observe(peak, tokens, valid, priority, extra=channel),
        )

    @property
    def median(self) -> float:
        """Median magnitude of the hidden state, within an eighth; NaN when nothing was seen."""
        total = int(self.magnitudes.sum())
        if not total:
            return float("nan")
        index = int((self.magnitudes.cumsum(0) * 2 < total).sum())
        edges = torch.cat([torch.zeros(1, dtype=torch.float64), BINS.edges()])
        return float(edges[index : index + 2].mean())

    @property
    def threshold(self) -> float:
        """Magnitude from which an entry counts as massive."""
        return max(FLOOR, RATIO * self.median)

    @property
    def peak(self) -> float:
        return float(self.channel_peak.max())

    @property
    def channels(self) -> list[int]:
        """Hidden channels that hold massive entries, strongest first."""
        order = self.channel_peak.argsort(descending=True)
        return [int(c) for c in order if float(self.channel_peak[c]) >= self.threshold]

    @property
    def share(self) -> float:
        """Share of tokens that hold a massive entry."""
        first = int(BINS.number(torch.tensor(self.threshold)))
        return float(self.token_peaks[first:].sum() / self.token_peaks.sum().clamp(min=1))


def _by_torch(hidden: torch.Tensor, valid: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Largest magnitudes of channels [C] and of tokens [B, T], and counts of magnitudes."""
    channels, peaks = [], []
    # Row by row, so that magnitudes stay in the CPU's cache; and maxima without their places, which take six times as
    # long.
    for row, states in enumerate(hidden):
        size = states.abs()
        peaks.append(size.amax(-1))
        size = size if valid is None else size[valid[row]]
        channels.append(size.amax(0) if len(size) else size.new_zeros(hidden.shape[-1]))
    counts = _counts(hidden[..., ::_STRIDE] if valid is None else hidden[valid][:, ::_STRIDE])
    return torch.stack(channels).amax(0).float(), torch.stack(peaks), counts


def _counts(x: torch.Tensor) -> torch.Tensor:
    return torch.bincount(BINS.number(x).flatten(), minlength=BINS.levels + 1)
