"""From a statistics file and a checkpoint to the data that transforms are fitted on."""

from collections.abc import Mapping
from pathlib import Path

import torch

from kvq.calib.stats import LayerStats, Stats
from kvq.codecs import Codec
from kvq.errors import DataError, UnsupportedModelError
from kvq.heads import HeadSpec
from kvq.models.architecture import Attention, Projection, describe_attention
from kvq.models.describe import LayerSpec, ModelSpec
from kvq.models.rope import rope_of
from kvq.models.stored import Weights
from kvq.transforms.fit_data import LONGEST_DISTANCE, FitData, Measured, Window


class FitSource:
    """FitData of any layer and side of one model.

    folder   the model's checkpoint; without it, whatever needs weights is refused.
    """

    def __init__(self, model: ModelSpec, stats: Stats, folder: Path | None):
        self.model, self.stats = model, stats
        self.weights = Weights(folder) if folder is not None else None
        self.attention = describe_attention(model.config)
        try:
            self.rope = rope_of(model.config)
        except UnsupportedModelError:
            self.rope = None
        self._pairs: dict[tuple[int, bool], tuple[torch.Tensor, torch.Tensor]] = {}

    def fit_data(self, layer: LayerSpec, side: str, spec: HeadSpec, codec: Codec) -> FitData:
        """What the first transform of a layer's side is fitted on. Raises DataError if the layer was not measured."""
        if layer.index not in self.stats.layers:
            raise DataError(
                f"the statistics of {self.stats.model!r} have no layer {layer.index}: run 'kvq calibrate' on this "
                "model."
            )
        measured = self.stats.layers[layer.index]
        attention = self.attention.get(layer.index) or Attention(index=layer.index, scaling=layer.head_dim**-0.5)
        reservoir = measured.parts.get("reservoir")
        partner, second = self._partners(layer.head_dim, attention.rotary)
        steps = getattr(spec.transforms, side)
        own = getattr(attention, side) if any(step.reads_projection(side) for step in steps) else None
        return FitData(
            side=side,
            heads=layer.kv_heads,
            windows=tuple(Window(*map(_plain, window)) for window in reservoir.windows()) if reservoir else (),
            codec=codec,
            scaling=reservoir.scaling if reservoir else attention.scaling,
            softcap=attention.softcap,
            partner=partner,
            second=second,
            given={name: given_of(measured, name) for name in ("query", "key", "value", "query_pre", "key_pre")},
            rope=self.rope if attention.rotary else None,
            longest=getattr(self.model.config, "max_position_embeddings", None) or LONGEST_DISTANCE,
            output=self._output(attention, layer) if any(step.reads_output(side) for step in steps) else None,
            projection=self._blocks(own),
            bias=self._bias(attention, layer) if side == "key" else None,
            shared=side == "key" and attention.key_norm is not None and attention.key_norm.shared,
            exact=spec.tokens.sinks,
            window=spec.tokens.window,
        )

    def _partners(self, head_dim: int, rotary: bool) -> tuple[torch.Tensor, torch.Tensor]:
        key = head_dim, rotary and self.rope is not None
        if key not in self._pairs:
            alone = torch.arange(head_dim), torch.zeros(head_dim, dtype=torch.bool)
            self._pairs[key] = self.rope.partners(head_dim) if key[1] else alone
        return self._pairs[key]

    def _read(self, name: str | None) -> torch.Tensor | None:
        return None if self.weights is None or name is None else self.weights.read(name)

    def _blocks(self, projection: Projection | None) -> torch.Tensor | None:
        """Blocks of a projection into the cache, [KV heads, head_dim, hidden]."""
        weight = self._read(projection.weight) if projection else None
        return None if weight is None else torch.stack([weight[span] for span in projection.heads])

    def _output(self, attention: Attention, layer: LayerSpec) -> torch.Tensor | None:
        """Blocks of the output projection, [query heads, hidden, head_dim]."""
        projection = attention.output.get(layer.index)
        weight = self._read(projection.weight) if projection else None
        return None if weight is None else torch.stack([weight[:, span] for span in projection.heads])

    def _bias(self, attention: Attention, layer: LayerSpec) -> torch.Tensor | None:
        """Bias of the key projection as keys get it, [KV heads, head_dim]; None if there is none, or a norm follows."""
        projection: Projection | None = attention.key if attention.key_norm is None else None
        bias = self._read(projection.bias) if projection else None
        return None if bias is None else torch.stack([bias[span] for span in projection.heads])


def _plain(x: torch.Tensor) -> torch.Tensor:
    # Statistics that were just collected are inference tensors, which gradients refuse.
    return x.clone() if x.is_inference() else x


def given_of(measured: LayerStats, name: str) -> Measured:
    """What a layer's statistics say of a tensor over all calibration text."""
    found: dict[str, torch.Tensor] = {}
    if f"{name}.range" in measured:
        spread = measured[f"{name}.range"]
        found |= {"absmax": spread.absmax.double(), "mean": spread.sum / spread.count}
    if f"{name}.moments" in measured:
        second = measured[f"{name}.moments"].second
        # Of what reads keys only the second moment counts, about zero.
        mean = found.setdefault("mean", torch.zeros_like(second[..., 0])) if name == "query_pre" else found.get("mean")
        if mean is not None:
            found["covariance"] = second - mean.unsqueeze(-1) * mean.unsqueeze(-2)
    if f"{name}.joint_moments" in measured and "mean" in found:
        mean = found["mean"].flatten()
        found["joint"] = measured[f"{name}.joint_moments"].second[0] - torch.outer(mean, mean)
    refuse_infinite(found, name)
    return found


def refuse_infinite(found: Mapping[str, torch.Tensor], name: str) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in found.values()):
        raise DataError(
            f"the statistics hold a {name} that is NaN or infinite: calibrate again in float32 or bfloat16."
        )
