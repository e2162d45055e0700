"""What in a model makes its cache hard to quantize, found in statistics, or in config and weights alone.

key_bias      keys carry a constant much larger than what differs between tokens (Qwen 2.5), which uses up the range
              of whatever scales a token's channels together
massive       massive activations (arXiv 2402.17762) make the first tokens' keys much larger than all others'
few_layers    few layers with full attention carry all long-range recall, and no others make up for their errors
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvq.calib.stats import LayerStats, Stats
from kvq.models.architecture import describe_attention
from kvq.models.describe import ModelSpec
from kvq.models.stored import Weights
from kvq.recipe import Recipe

# Largest mean of a channel in units of what keys vary by. SmolLM2: up to 17; Qwen 2.5: hundreds.
BIAS_RATIO = 30.0
# How many times larger the first token's key is than an ordinary token's.
FIRST_RATIO = 4.0
# Models with fewer layers of full attention are said to have few.
FEW_LAYERS = 8


@dataclass(frozen=True, kw_only=True)
class Cause:
    """kind      as above.
    layers    where, worst first; of a whole model all full-attention layers.
    size      of the worst: how many times larger than what is ordinary, or how many layers.
    text      a sentence for people.  advice  what to do about it.
    """

    kind: str
    layers: tuple[int, ...]
    size: float
    text: str
    advice: str


def causes_of(stats: Stats) -> list[Cause]:
    """Causes found in statistics; needs ``DEFAULT_NEEDS`` for all of them, and finds fewer with less."""
    spec = stats.spec()
    full = [layer.index for layer in spec.full_layers if layer.index in stats.layers]
    biased = {i: ratio for i in full if (ratio := bias_ratio(stats.layers[i])) >= BIAS_RATIO}
    first = {i: ratio for i in full if (ratio := first_ratio(stats.layers[i])) >= FIRST_RATIO}
    channels = sorted({c for i in stats.layers if "massive" in stats.layers[i] for c in _massive(stats.layers[i])})
    found = [_key_bias(biased, "keys")] if biased else []
    if first:
        found.append(_massive_cause(first, channels))
    return found + few_layers(spec)


def causes_of_weights(spec: ModelSpec, weights: Weights) -> list[Cause]:
    """What config and weights alone show: key biases against the keys that the projection makes of normed inputs."""
    biased = {}
    for layer in spec.full_layers:
        attention = describe_attention(spec.config).get(layer.index)
        key = attention.key if attention and attention.key_norm is None else None
        bias = weights.read(key.bias) if key and key.bias else None
        if bias is None:
            continue
        weight = weights.read(key.weight)
        gain = weights.read(f"{key.weight.rpartition('.self_attn.')[0]}.input_layernorm.weight")
        weight = weight * gain if gain is not None and gain.shape == weight.shape[1:] else weight
        # Entries of a normed input have mean square 1; the variance of a key channel is the row's squared length.
        spread = torch.stack([weight[span].square().sum(1).mean().sqrt() for span in key.heads])
        ratio = float((torch.stack([bias[span].abs().amax() for span in key.heads]) / spread).max())
        if ratio >= BIAS_RATIO:
            biased[layer.index] = ratio
    return ([_key_bias(biased, "the key projection's bias")] if biased else []) + few_layers(spec)


def endangered(recipe: Recipe, causes: Sequence[Cause]) -> Cause | None:
    """The cause that is likely to ruin a model with this recipe: a large key bias, where keys share a scale over the
    channels of a token as they are or rotated. None if there is none, and of other steps nothing is claimed."""
    biased = next((cause for cause in causes if cause.kind == "key_bias"), None)
    key = recipe.key.to_dict()
    kinds = {step.kind for step in recipe.transforms.key}
    by_channel = key.get("axis") == "channel" or (key["codec"], key.get("scale")) == ("book", "calibrated")
    is_safe = key["codec"] == "exact" or by_channel or bool(kinds - {"hadamard"})
    return None if is_safe else biased


def bias_ratio(layer: LayerStats) -> float:
    """Largest mean of a key channel (before RoPE where known) in units of the keys' spread, worst head."""
    channels = layer.get("key_pre.range") or layer.get("key.range")
    if channels is None:
        return 0.0
    spread = channels.std.square().mean(1).sqrt()
    return float((channels.mean.abs().amax(1) / spread.clamp(min=1e-20)).max())


def first_ratio(layer: LayerStats) -> float:
    """Largest entry of the mean first token's key over that of an ordinary token, worst head."""
    sinks, channels = layer.get("sinks"), layer.get("key.range")
    if sinks is None or channels is None or not sinks.windows:
        return 0.0
    first = (sinks.first_key / sinks.windows).abs().amax(1)
    # All tokens but the first, of each window.
    others = channels.count - sinks.windows
    if others <= 0:
        return 0.0
    squares = (channels.sum_squares - sinks.first_key.square() / sinks.windows).clamp(min=0) / others
    # The channel that is largest on average, at about its 95th percentile.
    ordinary = 2 * squares.sqrt().amax(1)
    return float((first / ordinary.clamp(min=1e-20)).max())


def few_layers(spec: ModelSpec) -> list[Cause]:
    full, cached = len(spec.full_layers), len(spec.layers)
    if full >= FEW_LAYERS:
        return []
    layers = tuple(layer.index for layer in spec.full_layers)
    has, them = ("has", "it") if full == 1 else ("have", "them")
    text = f"only {full} of {cached} layers {has} full attention, and all long-range recall passes through {them}"
    advice = "use kivi4 or klt4 rather than fewer bits, and measure recall over long texts with 'kvq eval'"
    return [Cause(kind="few_layers", layers=layers, size=full, text=text, advice=advice)]


def _massive(layer: LayerStats) -> Sequence[int]:
    return layer["massive"].channels


def _key_bias(biased: dict[int, float], what: str) -> Cause:
    layers = _worst_first(biased)
    size = biased[layers[0]]
    return Cause(
        kind="key_bias",
        layers=layers,
        size=size,
        text=f"{what} hold a constant up to {size:,.0f} times what differs between tokens (layer {layers[0]})",
        advice="use kivi4 (a scale for each channel) or biassafe4 (keys without the bias), never one scale for a token",
    )


def _massive_cause(first: dict[int, float], channels: list[int]) -> Cause:
    layers = _worst_first(first)
    size = first[layers[0]]
    names = f" (hidden channel{'s' if len(channels) > 1 else ''} {', '.join(map(str, channels[:4]))})"
    return Cause(
        kind="massive",
        layers=layers,
        size=size,
        text=f"massive activations{names if channels else ''} make the first token's keys up to {size:,.0f} times "
        f"as large as others' (layer {layers[0]})",
        advice="use a recipe that keeps the first tokens exact, such as klt4 or sinks4, or set tokens.sinks=4",
    )


def _worst_first(sizes: dict[int, float]) -> tuple[int, ...]:
    return tuple(sorted(sizes, key=lambda index: -sizes[index]))
