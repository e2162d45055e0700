"""Static scales of calibrated float8, from statistics.

    scale = absmax over all heads and channels / 448,     and 1.0 where the absolute maximum is 0

The scale is the number that a stored 1.0 stands for (E4M3, largest magnitude 448), one per layer and side, which is
the convention of serving engines.
"""

import math

from kvq.calib.stats import Stats
from kvq.errors import DataError
from kvq.models.describe import ModelSpec
from kvq.quantizers.float8 import E4M3_MAX
from kvq.recipe import Recipe

SIDES = ("key", "value")


def scale_name(layer: int, side: str) -> str:
    """Name of a static scale: ``layers.{i}.key.scale`` or ``layers.{i}.value.scale``."""
    return f"layers.{layer}.{side}.scale"


def static_scales(stats: Stats) -> dict[str, float]:
    """Scales of every measured layer by name, for ``kvq.cache.make_plan``.

    Raises DataError if an absolute maximum is not finite.
    """
    scales = {}
    for index, layer in sorted(stats.layers.items()):
        for side in SIDES:
            absmax = float(getattr(layer, side).absmax.max())
            if not math.isfinite(absmax):
                raise DataError(
                    f"the statistics of layer {index} hold a {side} maximum of {absmax}, and a scale must be finite: "
                    "calibrate again in float32 or bfloat16."
                )
            scales[scale_name(index, side)] = absmax / E4M3_MAX if absmax else 1.0
    return scales


def needed_scales(recipe: Recipe, model: ModelSpec) -> tuple[str, ...]:
    """Names of the scales that a recipe reads on this model; empty for a recipe without calibrated float8."""
    names = []
    for layer in model.full_layers:
        heads = [recipe.for_head(layer.index, head, len(model.layers)) for head in range(layer.kv_heads)]
        names += [
            scale_name(layer.index, side)
            for side in SIDES
            if any(getattr(head, side).scale == "calibrated" for head in heads)
        ]
    return tuple(names)
