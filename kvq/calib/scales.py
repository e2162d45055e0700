"""Static scales from statistics: what a stored 1.0 stands for. FP4: the largest magnitude / 2688. FP8, by method:

    max          the largest magnitude seen / 448: nothing that was seen is clipped.
    percentile   the magnitude that ``percentile`` of all numbers stay below / 448: rarer ones are clipped.
    mse          the scale of least squared error over the numbers seen, among eighths of octaves below ``max``.

FP8 keeps three digits of mantissa at any magnitude above 2^-6, so smaller scales gain little until numbers fall below
that, and clipping costs much: ``max`` is the default, and what serving engines' producers write.
"""

import math

import torch

from kvq.calib.kinds import Histogram
from kvq.calib.kinds.histogram import bin_edges
from kvq.calib.stats import LayerStats
from kvq.codec_specs import CodecSpec
from kvq.codecs.float4 import E2M1_MAX
from kvq.codecs.float8 import E4M3_MAX, Float8Codec
from kvq.errors import DataError

# Points in a bin of a histogram, which is as wide as a step of E4M3; octaves searched below the largest magnitude, and
# steps an octave.
_POINTS = 16
_OCTAVES, _STEPS = 4, 8


def float4_scale(absmax: torch.Tensor, index: int, tensor: str) -> torch.Tensor:
    """Global scale of NVFP4, float64 []; 1.0 where all was zero. ``absmax`` [K, head_dim].

    Raises DataError if the statistics are not finite.
    """
    scale = _finite(absmax, index, tensor).max() / (E2M1_MAX * E4M3_MAX)
    return torch.where(scale > 0, scale, 1.0)


def float8_scale(
    spec: CodecSpec,
    absmax: torch.Tensor,
    index: int,
    tensor: str,
    layer: LayerStats | None = None,
    heads: tuple[int, ...] | None = None,
) -> torch.Tensor:
    """Scale of K heads of one layer, float64: [] for granularity tensor, [K] for head; 1.0 where all was zero.

    absmax   [K, head_dim], of what is stored.
    tensor   what the statistics call it: key, key_pre or value.
    layer    statistics of what is stored, for methods that need more; None after transforms.
    heads    which heads of the layer these are; None: all.

    Raises DataError if the statistics are not finite or hold no histogram that the method needs.
    """
    absmax = _finite(absmax, index, tensor).amax(-1)
    by_head = spec.granularity == "head"
    largest = absmax if by_head else absmax.max().reshape(1)
    scales = largest / E4M3_MAX
    if spec.method in ("percentile", "mse"):
        if layer is None:
            raise DataError(
                f"method={spec.method} reads a histogram, and there is none of {tensor}s after transforms: use max."
            )
        counts = layer[f"{tensor}.histogram"].counts.sum(1)
        counts = counts if heads is None else counts[list(heads)]
        counts = counts if by_head else counts.sum(0, keepdim=True)
        if spec.method == "percentile":
            scales = torch.stack([_percentile(c, top, spec.percentile) for c, top in zip(counts, largest)]) / E4M3_MAX
        else:
            scales = torch.stack([_least_error(c, scale) for c, scale in zip(counts, scales)])
    scales = torch.where(scales > 0, scales, 1.0)
    return scales if by_head else scales[0]


def _finite(absmax: torch.Tensor, index: int, tensor: str) -> torch.Tensor:
    if not bool(absmax.isfinite().all()):
        worst = float(absmax.max())
        raise DataError(
            f"the statistics of layer {index} hold a {tensor} maximum of {worst}, and a scale must be finite: "
            "calibrate again in float32 or bfloat16."
        )
    return absmax.double()


def _percentile(counts: torch.Tensor, largest: torch.Tensor, percentile: float) -> torch.Tensor:
    """The magnitude that ``percentile`` of the counted numbers stay below; never above the largest seen."""
    # The histogram mirrors negative numbers: folding it gives one of magnitudes.
    middle = len(counts) // 2
    folded = counts[middle:].clone()
    folded[1:] += counts[:middle].flip(0)
    padded = torch.zeros_like(counts)
    padded[middle:] = folded
    value = Histogram(counts=padded.view(1, 1, -1)).quantile(percentile / 100)
    return torch.minimum(value.double().reshape(()), largest)


def _least_error(counts: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """The scale in [start / 2^4, start] of least squared error, numbers spread evenly inside their bins."""
    used = counts > 0
    if not bool(used.any()) or not float(start):
        return start
    edges = bin_edges()
    low, high = edges[:-1][used], edges[1:][used]
    inside = (torch.arange(_POINTS, dtype=torch.float64) + 0.5) / _POINTS
    points = (low.unsqueeze(1) + (high - low).unsqueeze(1) * inside).clamp(-start * E4M3_MAX, start * E4M3_MAX)
    weights = counts[used].double().unsqueeze(1)
    candidates = [float(start) * 2.0 ** (-step / _STEPS) for step in range(_OCTAVES * _STEPS + 1)]
    errors = [_squared_error(points, weights, scale) for scale in candidates]
    return torch.tensor(candidates[min(range(len(errors)), key=errors.__getitem__)], dtype=torch.float64)


def _squared_error(points: torch.Tensor, weights: torch.Tensor, scale: float) -> float:
    codec = Float8Codec(head_dim=points.shape[-1], scale=scale)
    error = float(((codec.decode(codec.encode(points), torch.float64) - points).square() * weights).sum())
    return error if math.isfinite(error) else math.inf
