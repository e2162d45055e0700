"""Tokens of one layer to try codecs on: real ones out of the reservoir, or drawn from histograms.

Drawn tokens have every channel's own distribution, independent of the others, and the positions that RoPE gives them;
or, where only second moments were measured, these moments. The first is no draw but the mean first token, which is
unlike all others where it is an attention sink.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from kvq.calib.observers import Histogram, Range
from kvq.calib.observers.histogram import bin_edges
from kvq.calib.stats import LayerStats
from kvq.errors import DataError
from kvq.models.rope import Rope
from kvq.transforms.frame import turned_moments

# Tokens drawn: enough for an error, and few enough to try many recipes. Real windows are used up to a length.
TOKENS = 256
LONGEST = 1024
WINDOWS = 1
# Queries of a real window that stand for all, from its second half: those of a long context.
PROBES = 64


@dataclass(frozen=True, kw_only=True)
class LayerTokens:
    """Keys after RoPE and values [W, K, T, D] of W windows, each from its first token on.

    query      [W, H, T, D], of real windows only; else None.
    energy     [K, D, D]: second moments of the queries that read each KV head; the diagonal where no more is known.
    first      [K]: share of attention that the first token gets.
    positions  int64 [1, T].  scaling: of q . k.
    """

    key: torch.Tensor
    value: torch.Tensor
    energy: torch.Tensor
    first: torch.Tensor
    positions: torch.Tensor
    scaling: float
    query: torch.Tensor | None = None

    @property
    def is_real(self) -> bool:
        return self.query is not None

    @cached_property
    def probes(self) -> torch.Tensor:
        """Positions of the queries that are looked at, int64 [P]."""
        tokens = self.key.shape[2]
        return torch.linspace(tokens // 2, tokens - 1, PROBES).long()

    @cached_property
    def scores(self) -> torch.Tensor:
        """q . k of the probes and the exact keys, scaled, [W, H, P, T]."""
        return self._scores(self.key)

    @cached_property
    def output(self) -> torch.Tensor:
        """The probes' attention outputs, [W, H, P, D]."""
        return self._softmax(self.scores) @ self._repeated(self.value)

    def output_with(self, key: torch.Tensor, value: torch.Tensor, exact: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The probes' outputs if they read other keys and values, except where ``exact``: by side, bool [K, P, T]."""
        mask = {side: self._repeated(places[None]) for side, places in exact.items()}
        weights = self._softmax(torch.where(mask["key"], self.scores, self._scores(key)))
        kept = weights * mask["value"]
        return kept @ self._repeated(self.value) + (weights - kept) @ self._repeated(value)

    def _scores(self, key: torch.Tensor) -> torch.Tensor:
        return self.query[:, :, self.probes] @ self._repeated(key).transpose(-1, -2) * self.scaling

    def _softmax(self, scores: torch.Tensor) -> torch.Tensor:
        later = torch.arange(self.key.shape[2]) > self.probes[:, None]
        return scores.masked_fill(later, float("-inf")).softmax(-1)

    def _repeated(self, x: torch.Tensor) -> torch.Tensor:
        """[W, K, ...] for every query head, [W, H, ...]."""
        return x.repeat_interleave(self.query.shape[1] // x.shape[1], dim=1)


def layer_tokens(layer: LayerStats, rope: Rope | None, scaling: float, seed: int = 0) -> LayerTokens:
    """Real tokens if there is a reservoir with windows of TOKENS tokens, else drawn ones.

    rope      to rotate drawn keys; None: they are drawn as they are after RoPE.
    scaling   of q . k, unless the reservoir knows it.

    Raises DataError if the layer holds too little.
    """
    windows = _real(layer)
    heads = layer["value.range"].absmax.shape[0]
    sinks = layer.get("sinks")
    first = sinks.share[:, 0].unflatten(0, (heads, -1)).mean(1) if sinks else torch.zeros(heads)
    if windows is not None:
        query, key, value = windows
        rows = query.transpose(0, 1).unflatten(0, (heads, -1)).flatten(1, 3)
        energy = rows.transpose(1, 2) @ rows / rows.shape[1]
        scaling = layer["reservoir"].scaling
    else:
        query, energy = None, _energy(layer, rope)
        key, value = _drawn(layer, rope, seed)
    if energy is None:
        raise DataError(
            "the statistics hold no queries, so no error of attention can be predicted: calibrate without --for or "
            "with --full, or measure recipes with 'kvq eval'."
        )
    positions = torch.arange(key.shape[2]).unsqueeze(0)
    return LayerTokens(
        key=key, value=value, query=query, energy=energy, first=first, positions=positions, scaling=scaling
    )


def _real(layer: LayerStats) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    if "reservoir" not in layer:
        return None
    windows = [w for w in layer["reservoir"].windows() if w[1].shape[1] >= TOKENS][:WINDOWS]
    if not windows:
        return None
    length = min(LONGEST, *(w[1].shape[1] for w in windows))
    return tuple(torch.stack([w[i][:, :length].float() for w in windows]) for i in range(3))


def _energy(layer: LayerStats, rope: Rope | None) -> torch.Tensor | None:
    if "query.moments" in layer:
        return layer["query.moments"].second.float()
    if "query_pre.moments" in layer:
        second = layer["query_pre.moments"].second
        places = torch.arange(0, TOKENS, 4)
        return turned_moments(rope, torch.zeros_like(second[..., 0]), second, places, reads=True)[1].float()
    return torch.diag_embed(layer["query.range"].rms.square()) if "query.range" in layer else None


def _drawn(layer: LayerStats, rope: Rope | None, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    name = "key_pre" if rope is not None and "key_pre.range" in layer else "key"
    key, value = (draw(layer, tensor, TOKENS, generator).unsqueeze(0) for tensor in (name, "value"))
    if name == "key_pre":
        key = rope.rotate(key, torch.arange(TOKENS).unsqueeze(0))
    sinks = layer.get("sinks")
    if sinks and sinks.windows:
        key[:, :, 0] = (sinks.first_key / sinks.windows).to(key.dtype)
        value[:, :, 0] = (sinks.first_value / sinks.windows).to(value.dtype)
    return key, value


def draw(layer: LayerStats, tensor: str, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Tokens [K, T, D] float32 by histogram, or normal ones within the range where there is no histogram."""
    channels: Range = layer[f"{tensor}.range"]
    histogram: Histogram | None = layer.get(f"{tensor}.histogram")
    if histogram is None:
        noise = torch.randn(*channels.absmax.shape, tokens, generator=generator)
        x = channels.mean[..., None] + _spread(layer, tensor) @ noise
    else:
        edges, below = bin_edges(), histogram.counts.double().cumsum(-1)
        # Uniform in (0, count]: an empty bin is never the first that reaches it.
        share = 1 - torch.rand(*below.shape[:2], tokens, generator=generator, dtype=torch.float64)
        bins = torch.searchsorted(below.contiguous(), share * below[..., -1:]).clamp(max=below.shape[-1] - 1)
        inside = torch.rand(bins.shape, generator=generator, dtype=torch.float64)
        x = (edges[bins] + (edges[bins + 1] - edges[bins]) * inside).float()
    x = torch.minimum(torch.maximum(x, channels.min[..., None]), channels.max[..., None])
    return x.transpose(1, 2).contiguous()


def _spread(layer: LayerStats, tensor: str) -> torch.Tensor:
    """A root of the covariance, [K, D, D] float32; only standard deviations where no more is known."""
    channels: Range = layer[f"{tensor}.range"]
    if f"{tensor}.moments" not in layer:
        return torch.diag_embed(channels.std)
    mean = channels.mean.double()
    values, vectors = torch.linalg.eigh(layer[f"{tensor}.moments"].second - mean.unsqueeze(-1) * mean.unsqueeze(-2))
    return (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)).float()
