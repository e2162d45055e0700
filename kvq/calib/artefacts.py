"""Artefacts: the tensors that a recipe needs beside codes and sections, made of statistics and stored in exports.

An artefact belongs to one layer and side and is named ``layers.{i}.{side}.{what}``; ``what`` starts with the part that
reads it, such as ``scale`` of calibrated float8.

    scale          float64, [] or, with granularity head, [kv_heads]: what a stored 1.0 stands for, after transforms;
                   the convention of serving engines (``kvq.calib.scales``).
    transforms.*   what the transforms of the side need (``kvq.transforms.KINDS``), by their place in the chain.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch

from kvq.calib.evidence import Source
from kvq.calib.learn import find_learned
from kvq.calib.scales import float8_scale
from kvq.calib.stats import Stats
from kvq.errors import DataError
from kvq.models.describe import LayerSpec, ModelSpec
from kvq.quantizers import build_codec
from kvq.recipe import Recipe
from kvq.specs import TransformSpec
from kvq.transforms import needed_tensors
from kvq.transforms.fit import fit_steps

SIDES = ("key", "value")


def artefact_name(layer: int, side: str, what: str) -> str:
    """Name of an artefact: ``layers.{i}.key.{what}`` or ``layers.{i}.value.{what}``."""
    return f"layers.{layer}.{side}.{what}"


def needed_artefacts(recipe: Recipe, model: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Shapes by name of the artefacts that a recipe reads on this model; empty for a recipe without calibration."""
    needed = {artefact_name(layer.index, side, what): shape for layer, side, what, shape, _ in _needed(recipe, model)}
    for layer, side, specs in _transforms(recipe, model):
        for what, shape in needed_tensors(specs, layer.kv_heads, layer.head_dim).items():
            needed[artefact_name(layer.index, side, what)] = shape
    return needed


def fit_artefacts(
    recipe: Recipe, model: ModelSpec, stats: Stats, folder: Path | None = None
) -> dict[str, torch.Tensor]:
    """Artefacts of a recipe by name, for ``kvq.cache.make_plan``.

    folder   the model's checkpoint, for transforms that read weights.

    Raises DataError if the statistics are not finite or lack what the recipe needs, and RecipeError for a learned
    transform that was not learned for this recipe.
    """
    found, fitted = {}, {}
    chains = list(_transforms(recipe, model))
    source = Source(model, stats, folder) if chains else None
    for layer, side, specs in chains:
        spec = recipe.for_head(layer.index, 0, len(model.layers))
        codec = build_codec(getattr(spec, side), layer.head_dim, {"scale": torch.ones(())})
        evidence = source.evidence(layer, side, spec, codec)
        learned = partial(find_learned, stats, recipe, spec, layer.index, side)
        numbers, fitted[layer.index, side] = fit_steps(specs, evidence, learned)
        found |= {artefact_name(layer.index, side, what): tensor for what, tensor in numbers.items()}
    for layer, side, what, _, fit in _needed(recipe, model):
        if layer.index not in stats.layers:
            raise DataError(
                f"the statistics of {stats.model!r} have no layer {layer.index}: run 'kvq calibrate' on this model."
            )
        after = fitted.get((layer.index, side))
        measured = stats.layers[layer.index]
        absmax = after.absmax(side) if after else measured[f"{side}.range"].absmax
        # Histograms are of what the model computes, before transforms.
        found[artefact_name(layer.index, side, what)] = fit(absmax, layer.index, side, None if after else measured)
    return found


def _transforms(recipe: Recipe, model: ModelSpec) -> Iterator[tuple[LayerSpec, str, tuple[TransformSpec, ...]]]:
    """(layer, side, steps) of every chain; the heads of a layer share theirs."""
    for layer in model.full_layers:
        spec = recipe.for_head(layer.index, 0, len(model.layers))
        for side in SIDES:
            if not spec.is_exact and getattr(spec.transforms, side):
                yield layer, side, getattr(spec.transforms, side)


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
            spec = next((spec for head in heads if (spec := getattr(head, side)).scale == "calibrated"), None)
            if spec is not None:
                shape = (layer.kv_heads,) if spec.granularity == "head" else ()
                yield layer, side, "scale", shape, partial(float8_scale, spec)
