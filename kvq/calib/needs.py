"""Which statistics a recipe reads, and which are collected when nobody asks for a recipe.

A need is ``tensor.kind``, or ``kind`` alone for what is measured on a layer as a whole:

    tensors   ``key`` after RoPE, as cached; ``key_pre`` before RoPE; ``value``; ``query`` after RoPE, the heads of a
              group counted as tokens of the KV head that they read; ``query_pre`` before RoPE, moments alone, from
              which those at any distance follow; ``key_page`` relative to the first token of every 64, ranges and
              histograms alone, which do not follow.
    kinds     ``kvq/calib/observers``: range, histogram, moments, ``joint_moments`` of all heads together, which are as
              large as all else and measured for recipes alone, and ``value.weighted_moments`` (weights: the attention
              that a token gets); reservoir, massive, sinks.

Codecs and transforms name their own.
"""

from collections.abc import Iterable

from kvq.errors import DataError, suggest
from kvq.heads import HeadSpec
from kvq.models.describe import ModelSpec
from kvq.pages.layout import SIDES
from kvq.recipe import Recipe

TENSORS = ("key", "key_pre", "value", "query")

ALL_NEEDS = frozenset(
    [f"{tensor}.{kind}" for tensor in TENSORS for kind in ("range", "histogram", "moments")]
    + ["query_pre.moments", "key_page.range", "key_page.histogram"]
    + ["value.weighted_moments", "reservoir", "massive", "sinks"]
)
# Beside these, what only a recipe that names it makes anyone measure.
JOINT_NEEDS = frozenset(f"{tensor}.joint_moments" for tensor in ("key", "key_pre", "value"))
# What a step reads that stands relative to the page or before RoPE.
_FRAMED = {
    "key.range": "key_pre.range",
    "key.moments": "key_pre.moments",
    "key.joint_moments": "key_pre.joint_moments",
    "query.range": "query_pre.moments",
    "query.moments": "query_pre.moments",
}
# What costs a seventh of a plain forward (``benchmarks/calibrate.py``): enough for a diagnosis and every recipe without
# moments.
DEFAULT_NEEDS = frozenset(
    [f"{tensor}.range" for tensor in TENSORS]
    + [f"{tensor}.histogram" for tensor in ("key_pre", "value")]
    + ["massive", "sinks"]
)


# All that is measured on sliding-window layers: kvq leaves them exact, and serving engines want their scales.
WINDOW_NEEDS = frozenset(f"{side}.{kind}" for side in ("key", "value") for kind in ("range", "histogram"))


def needs_of(recipe: Recipe, model: ModelSpec) -> frozenset[str]:
    """The statistics that a recipe reads in some layer or head of a model; empty for a recipe without calibration."""
    heads = {
        recipe.for_head(layer.index, head, len(model.layers))
        for layer in model.full_layers
        for head in range(layer.kv_heads)
    }
    return check_needs(need for head in heads for need in _head_needs(head))


def check_needs(needs: Iterable[str]) -> frozenset[str]:
    """Return the needs as a set. Raises DataError for an unknown one."""
    needs = frozenset(needs)
    for need in sorted(needs - ALL_NEEDS - JOINT_NEEDS):
        raise DataError(f"{need!r} is no statistic.{suggest(need, ALL_NEEDS | JOINT_NEEDS)}")
    return needs


def _head_needs(head: HeadSpec) -> set[str]:
    found: set[str] = set()
    for side in SIDES:
        codec, steps = getattr(head, side), getattr(head.transforms, side)
        framed = len(steps) - (head.framed_steps if side == "key" else 0)
        found |= codec.needs(side).union(*(step.needs(side) for step in steps[:framed]))
        found |= {_FRAMED.get(need, need) for step in steps[framed:] for need in step.needs(side)}
        # What a step has turned, or will move, is measured again on token vectors.
        moves = [step for step in steps if not step.keeps_magnitudes]
        reads = any(step.reads_magnitudes for step in steps) and any(step.tensors for step in moves)
        if (moves and codec.is_calibrated) or reads:
            found.add("reservoir")
    return found
