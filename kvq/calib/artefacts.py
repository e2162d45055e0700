"""Artefacts: the tensors that a recipe needs beside codes and sections, made of statistics and stored in exports.

An artefact belongs to one layer and side and is named ``layers.{i}.{side}.{what}``, with ``group{n}.`` before ``what``
for the second and further groups of K heads that a recipe treats alike.

    codec's own   what its settings name (``CodecSpec.artefacts``), for the heads of the group.
    transforms.*  what the transforms of the side need, by their place in the chain.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kvq.cache.plan import artefact_name
from kvq.calib.codebooks import Book, learned
from kvq.calib.fit_source import FitSource
from kvq.calib.learn import find_learned
from kvq.calib.measured import MeasuredLayer
from kvq.calib.observers.bins import Bins
from kvq.calib.stats import Stats
from kvq.codecs import Artefact, CodecSpec
from kvq.errors import DataError
from kvq.models.describe import LayerSpec, ModelSpec
from kvq.pages.layout import SIDES
from kvq.recipe import Recipe
from kvq.transforms import TransformSpec, needed_tensors
from kvq.transforms.fit import fit_steps


@dataclass(frozen=True, kw_only=True)
class _Use:
    """One codec that reads artefacts: the heads ``heads``, group ``group`` of a layer, ``dim`` channels of each."""

    layer: LayerSpec
    side: str
    group: int
    heads: tuple[int, ...]
    dim: int
    spec: CodecSpec
    sinks: int

    def named(self, found: Mapping[str, Any]) -> dict[str, Any]:
        return {artefact_name(self.layer.index, self.side, what, self.group): own for what, own in found.items()}

    def fit(self, stats: Stats, absmax: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Tensors by name. ``absmax`` [K, head_dim]: after transforms; None: there are none."""
        index = self.layer.index
        if index not in stats.layers:
            raise DataError(
                f"the statistics of {stats.model!r} have no layer {index}: run 'kvq calibrate' on this model."
            )
        tensor, codebook = self.spec.tensor(self.side), partial(self._codebook, stats)
        measured = MeasuredLayer(stats.layers[index], index, tensor, self.heads, absmax, codebook)
        return self.named(self.spec.fit(measured))

    def _codebook(self, stats: Stats) -> Bins:
        book = Book(side=self.side, heads=self.heads, spec=self.spec, sinks=self.sinks)
        bins = learned(stats, self.layer.index, book)
        if not bool(bins.counts.any()):
            raise DataError(
                f"the codebook of the {self.side}s of layer {self.layer.index} was learned from no numbers at all: "
                "calibrate with longer windows."
            )
        return bins


def needed_artefacts(recipe: Recipe, model: ModelSpec) -> dict[str, Artefact]:
    """The artefacts that a recipe reads on this model, by name; empty for a recipe without calibration."""
    needed: dict[str, Artefact] = {}
    for use in _uses(recipe, model):
        needed |= use.named(use.spec.artefacts(use.dim, len(use.heads)))
    for layer, side, specs in _transforms(recipe, model):
        for what, own in needed_tensors(specs, layer.kv_heads, layer.head_dim).items():
            needed[artefact_name(layer.index, side, what)] = own
    return needed


def stand_in_artefacts(recipe: Recipe, model: ModelSpec) -> dict[str, torch.Tensor]:
    """Artefacts that fit a recipe without any statistics, for where bytes and speed matter and numbers do not."""
    return {name: own.stand_in(own.shape) for name, own in needed_artefacts(recipe, model).items()}


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
    source = FitSource(model, stats, folder) if chains else None
    for layer, side, specs in chains:
        spec = recipe.for_head(layer.index, 0, len(model.layers))
        codec = getattr(spec, side).stand_in(spec.stored_dim(side, layer.head_dim), layer.kv_heads)
        data = source.fit_data(layer, side, spec, codec)
        learned = partial(find_learned, stats, recipe, spec, layer.index, side)
        numbers, fitted[layer.index, side] = fit_steps(specs, data, learned, **spec.framing(side))
        found |= {artefact_name(layer.index, side, what): tensor for what, tensor in numbers.items()}
    for use in _uses(recipe, model):
        after = fitted.get((use.layer.index, use.side))
        found |= use.fit(stats, after.absmax(use.side) if after else None)
    return found


def _transforms(recipe: Recipe, model: ModelSpec) -> Iterator[tuple[LayerSpec, str, tuple[TransformSpec, ...]]]:
    """(layer, side, steps) of every chain; the heads of a layer share theirs."""
    for layer in model.full_layers:
        spec = recipe.for_head(layer.index, 0, len(model.layers))
        for side in SIDES:
            if not spec.is_exact and getattr(spec.transforms, side):
                yield layer, side, getattr(spec.transforms, side)


def check_artefacts(tensors: Mapping[str, torch.Tensor], needed: Mapping[str, Artefact]) -> str | None:
    """What is wrong with artefacts read from a file, as the end of a sentence; None if nothing is."""
    for name in sorted(set(tensors) ^ set(needed)):
        return f"lacks {name!r}" if name in needed else f"holds the unknown tensor {name!r}"
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != needed[name].shape:
            return f"has {name!r} of shape {list(tensor.shape)}, not {list(needed[name].shape)}"
        if not bool(tensor.isfinite().all()):
            return f"has NaN or infinity in {name!r}"
        wrong = needed[name].wrong(tensor)
        if wrong:
            return f"has {wrong} in {name!r}"
    return None


def _uses(recipe: Recipe, model: ModelSpec) -> Iterator[_Use]:
    for layer in model.full_layers:
        groups = recipe.head_groups(layer.index, layer.kv_heads, len(model.layers))
        for number, (spec, heads) in enumerate(groups):
            for side in SIDES:
                codec, dim = getattr(spec, side), spec.stored_dim(side, layer.head_dim)
                if codec.is_calibrated:
                    own = {"heads": heads, "dim": dim, "spec": codec, "sinks": spec.tokens.sinks}
                    yield _Use(layer=layer, side=side, group=number, **own)
