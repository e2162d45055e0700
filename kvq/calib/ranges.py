"""Static tensors of codecs that follow from ranges and quantiles: scales, per-channel ranges, places of channels."""

import torch

from kvq.calib.scales import float4_scale, float8_scale
from kvq.calib.stats import LayerStats
from kvq.codec_specs import CodecSpec

KMEANS_ROUNDS = 20


def static_tensors(
    spec: CodecSpec,
    layer: LayerStats,
    index: int,
    side: str,
    heads: tuple[int, ...],
    absmax: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """What a codec needs beside its codebook, by name, for these heads of a layer.

    absmax   [K, head_dim] of what the codec sees, if that is not what the statistics measured.

    Raises DataError if the statistics lack it or are not finite.
    """
    tensor = "key_pre" if spec.placement == "pre_rope" else side
    found = {}
    if spec.scale == "calibrated" and spec.codec in ("float8", "float4"):
        # Histograms are of what the model computes, before transforms.
        measured = layer if absmax is None else None
        absmax = (layer[f"{tensor}.range"].absmax if absmax is None else absmax)[list(heads)]
        if spec.codec == "float8":
            found["scale"] = float8_scale(spec, absmax, index, tensor, measured, heads)
        else:
            found["scale"] = float4_scale(absmax, index, tensor)
    if spec.scale == "calibrated" and spec.codec == "book":
        found["range"] = channel_ranges(layer, tensor, spec.outliers.share if spec.outliers else 0.0)[list(heads)]
    if spec.permute is not None:
        ends = torch.stack([getattr(layer[f"{tensor}.range"], end)[list(heads)] for end in ("min", "max")], dim=-1)
        found["order"] = channel_order(ends.double().flatten(0, 1), spec.group_size(ends.shape[1])).view(ends.shape[:2])
    return found


def channel_ranges(layer: LayerStats, tensor: str, share: float) -> torch.Tensor:
    """(half range, middle) of every channel, float64 [K, head_dim, 2] (KVQuant, section 3.1).

    share   of a channel's numbers that lie outside, half of them at each end; 0: the range of all numbers.
    """
    if share:
        histogram = layer[f"{tensor}.histogram"]
        low, high = histogram.quantile(share / 2).double(), histogram.quantile(1 - share / 2).double()
    else:
        low, high = layer[f"{tensor}.range"].min.double(), layer[f"{tensor}.range"].max.double()
    # A channel that never changes would have no range to divide by.
    half = ((high - low) / 2).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.stack([half, (high + low) / 2], dim=-1)


def channel_order(ends: torch.Tensor, group: int) -> torch.Tensor:
    """Places of channels so that each ``group`` neighbours have like (minimum, maximum) ``ends`` [n, 2]: int32 [n].

    k-means with clusters of equal size: channels are assigned to centres by the assignment of least total distance, and
    centres move to their channels' mean, from a start by size of the range. (SKVQ's clusters are of any size; equal
    ones keep pages as they are.)
    """
    from scipy.optimize import linear_sum_assignment

    count = len(ends) // group
    start = (ends[:, 1] - ends[:, 0]).argsort(stable=True)
    centres = ends[start].view(count, group, 2).mean(1)
    assigned = None
    for _ in range(KMEANS_ROUNDS):
        distance = (ends[:, None] - centres).square().sum(-1).repeat_interleave(group, dim=1)
        _, slot = linear_sum_assignment(distance.numpy())
        cluster = torch.from_numpy(slot) // group
        if assigned is not None and torch.equal(cluster, assigned):
            break
        assigned = cluster
        centres = torch.stack([ends[cluster == i].mean(0) for i in range(count)])
    return assigned.argsort(stable=True).to(torch.int32)
