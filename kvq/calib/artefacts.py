"""Artefacts: the tensors that a recipe needs beside codes and sections, made of statistics and stored in exports.

An artefact belongs to one layer and side and is named ``layers.{i}.{side}.{what}``; ``what`` starts with the part that
reads it, such as ``scale`` of calibrated float8.

    scale   [] float64: absmax over all heads and channels / 448, and 1.0 where the absolute maximum is 0. It is what a
            stored 1.0 stands for, one per layer and side: the convention of serving engines.
"""

import math
from collections.abc import Iterator, Mapping

import torch

from kvq.calib.stats import LayerStats, Stats
from kvq.errors import DataError
from kvq.models.describe import ModelSpec
from kvq.quantizers.float8 import E4M3_MAX
from kvq.recipe import Recipe

SIDES = ("key", "value")


def artefact_name(layer: int, side: str, what: str) -> str:
    """Name of an artefact: ``layers.{i}.key.{what}`` or ``layers.{i}.value.{what}``."""
    return f"layers.{layer}.{side}.{what}"


def needed_artefacts(recipe: Recipe, model: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Shapes by name of the artefacts that a recipe reads on this model; empty for a recipe without calibration."""
    return {artefact_name(layer.index, side, what): shape for layer, side, what, shape, _ in _needed(recipe, model)}


def fit_artefacts(recipe: Recipe, model: ModelSpec, stats: Stats) -> dict[str, torch.Tensor]:
    """Artefacts of a recipe by name, for ``kvq.cache.make_plan``.

    Raises DataError if the statistics are not finite or lack what the recipe needs.
    """
    found = {}
    for layer, side, what, _, fit in _needed(recipe, model):
        if layer.index not in stats.layers:
            raise DataError(
                f"the statistics of {stats.model!r} have no layer {layer.index}: run 'kvq calibrate' on this model."
            )
        found[artefact_name(layer.index, side, what)] = fit(stats.layers[layer.index], layer.index, side)
    return found


def check_artefacts(tensors: Mapping[str, torch.Tensor], needed: Mapping[str, tuple[int, ...]]) -> str | None:
    """What is wrong with artefacts read from a file, as the end of a sentence; None if nothing is."""
    for name in sorted(set(tensors) ^ set(needed)):
        return f"lacks {name!r}" if name in needed else f"holds the unknown tensor {name!r}"
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != tuple(needed[name]):
            return f"has {name!r} of shape {list(tensor.shape)}, not {list(needed[name])}"
        if not bool(tensor.isfinite().all()):
            return f"has NaN or infinity in {name!r}"
        if name.endswith(".scale") and not bool((tensor > 0).all()):
            return f"has a scale in {name!r} that is not positive"
    return None


def _needed(recipe: Recipe, model: ModelSpec) -> Iterator[tuple]:
    """(layer, side, what, shape, how it is fitted) of every artefact."""
    for layer in model.full_layers:
        heads = [recipe.for_head(layer.index, head, len(model.layers)) for head in range(layer.kv_heads)]
        for side in SIDES:
            if any(getattr(head, side).scale == "calibrated" for head in heads):
                yield layer, side, "scale", (), _float8_scale


def _float8_scale(layer: LayerStats, index: int, side: str) -> torch.Tensor:
    absmax = float(getattr(layer, side).absmax.max())
    if not math.isfinite(absmax):
        raise DataError(
            f"the statistics of layer {index} hold a {side} maximum of {absmax}, and a scale must be finite: "
            "calibrate again in float32 or bfloat16."
        )
    return torch.tensor(absmax / E4M3_MAX if absmax else 1.0, dtype=torch.float64)
