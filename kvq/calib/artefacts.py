"""Artefacts: the tensors that a recipe needs beside codes and sections, made of statistics and stored in exports.

An artefact belongs to one layer and side and is named ``layers.{i}.{side}.{what}``, with ``group{n}.`` before ``what``
for the second and further groups of K heads that a recipe treats alike.

    scale    float64, [] or, with granularity head, [K]: what a stored 1.0 stands for, after transforms; the
             convention of serving engines (``kvq.calib.scales``).
    range    [K, head_dim, 2] float64: half range and middle of every channel; with outliers, of all but their share.
    levels   [2^bits] float64: what the codes of a codebook stand for, ascending.
    edges    [2^bits - 1] float64: where one code ends and the next begins.
    order    [K, head_dim] int32: which channel of the heads side by side is stored in this place.
    transforms.*   what the transforms of the side need (``kvq.transforms.KINDS``), by their place in the chain.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from kvq.cache.plan import artefact_name
from kvq.calib.codebooks import Book, learned
from kvq.calib.evidence import Source
from kvq.calib.kinds.bins import bin_middles
from kvq.calib.kmeans import levels_of, q_norm
from kvq.calib.learn import find_learned
from kvq.calib.ranges import static_tensors
from kvq.calib.stats import Stats
from kvq.codec_specs import CodecSpec
from kvq.codecs import build_codec, codec_tensors
from kvq.codecs.levels import midpoints
from kvq.errors import DataError
from kvq.models.describe import LayerSpec, ModelSpec
from kvq.pages.layout import SIDES
from kvq.recipe import Recipe
from kvq.specs import TransformSpec
from kvq.transforms import needed_tensors
from kvq.transforms.fit import fit_steps

# Share of unweighted counts in a codebook's weights, so that it is defined where gradients are all zero.
_PLAIN_SHARE = 1e-6


@dataclass(frozen=True, kw_only=True)
class _Use:
    """One codec that reads artefacts: the heads ``heads``, group ``group`` of a layer."""

    layer: LayerSpec
    side: str
    group: int
    heads: tuple[int, ...]
    spec: CodecSpec
    sinks: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        found = codec_tensors(self.spec, self.layer.head_dim, len(self.heads))
        return {artefact_name(self.layer.index, self.side, what, self.group): shape for what, shape in found.items()}

    def fit(self, stats: Stats, absmax: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Tensors by name. ``absmax`` [K, head_dim]: after transforms; None: there are none."""
        index = self.layer.index
        if index not in stats.layers:
            raise DataError(
                f"the statistics of {stats.model!r} have no layer {index}: run 'kvq calibrate' on this model."
            )
        found = static_tensors(self.spec, stats.layers[index], index, self.side, self.heads, absmax)
        if self.spec.levels == "calibrated":
            found |= self._codebook(stats)
        return {artefact_name(index, self.side, what, self.group): tensor for what, tensor in found.items()}

    def _codebook(self, stats: Stats) -> dict[str, torch.Tensor]:
        book = Book(side=self.side, heads=self.heads, spec=self.spec, sinks=self.sinks)
        bins = learned(stats, self.layer.index, book)
        if not bool(bins.counts.any()):
            raise DataError(
                f"the codebook of the {self.side}s of layer {self.layer.index} was learned from no numbers at all: "
                "calibrate with longer windows."
            )
        weights = counts = bins.counts / bins.counts.sum()
        if self.spec.weights == "fisher":
            weights = (
                bins.weights / bins.weights.sum().clamp_min(torch.finfo(torch.float64).tiny) + _PLAIN_SHARE * counts
            )
        levels = levels_of(bin_middles(), weights, 2**self.spec.bits)
        edges = midpoints(levels)
        if self.spec.q_norm:
            levels = q_norm(levels, bin_middles(), counts)
        return {"levels": levels, "edges": edges}


def needed_artefacts(recipe: Recipe, model: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Shapes by name of the artefacts that a recipe reads on this model; empty for a recipe without calibration."""
    needed = {name: shape for use in _uses(recipe, model) for name, shape in use.shapes.items()}
    for layer, side, specs in _transforms(recipe, model):
        for what, shape in needed_tensors(specs, layer.kv_heads, layer.head_dim).items():
            needed[artefact_name(layer.index, side, what)] = shape
    return needed


def stand_in_artefacts(recipe: Recipe, model: ModelSpec) -> dict[str, torch.Tensor]:
    """Artefacts that fit a recipe without any statistics, for where bytes and speed matter and numbers do not."""
    return stand_ins(needed_artefacts(recipe, model))


def stand_ins(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Tensors of these shapes that pass ``check_artefacts``."""
    return {name: _STAND_INS.get(name.rpartition(".")[2], torch.ones)(shape) for name, shape in shapes.items()}


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
        codec = build_codec(getattr(spec, side), layer.head_dim, {"scale": torch.ones(())}, layer.kv_heads)
        evidence = source.evidence(layer, side, spec, codec)
        learned = partial(find_learned, stats, recipe, spec, layer.index, side)
        numbers, fitted[layer.index, side] = fit_steps(specs, evidence, learned)
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


def check_artefacts(tensors: Mapping[str, torch.Tensor], needed: Mapping[str, tuple[int, ...]]) -> str | None:
    """What is wrong with artefacts read from a file, as the end of a sentence; None if nothing is."""
    for name in sorted(set(tensors) ^ set(needed)):
        return f"lacks {name!r}" if name in needed else f"holds the unknown tensor {name!r}"
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != tuple(needed[name]):
            return f"has {name!r} of shape {list(tensor.shape)}, not {list(needed[name])}"
        if not bool(tensor.isfinite().all()):
            return f"has NaN or infinity in {name!r}"
        wrong = _CHECKS.get(name.rpartition(".")[2], lambda _: None)(tensor)
        if wrong:
            return f"has {wrong} in {name!r}"
    return None


def _not_positive(tensor: torch.Tensor) -> str | None:
    return None if bool((tensor > 0).all()) else "a scale that is not positive"


def _not_ascending(tensor: torch.Tensor) -> str | None:
    return None if bool((tensor.diff() >= 0).all()) else "numbers that do not ascend"


def _no_permutation(tensor: torch.Tensor) -> str | None:
    places = torch.arange(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    return None if torch.equal(tensor.flatten().sort().values, places) else "something else than places of all channels"


_CHECKS = {
    "scale": _not_positive,
    "range": lambda tensor: _not_positive(tensor[..., 0]),
    "levels": _not_ascending,
    "edges": _not_ascending,
    "order": _no_permutation,
}


_STAND_INS = {
    "range": lambda shape: torch.tensor([4.0, 0.0], dtype=torch.float64).expand(shape).clone(),
    "levels": lambda shape: torch.linspace(-1, 1, *shape, dtype=torch.float64),
    "edges": lambda shape: midpoints(torch.linspace(-1, 1, shape[0] + 1, dtype=torch.float64)),
    "order": lambda shape: torch.arange(math.prod(shape), dtype=torch.int32).view(shape),
}


def _uses(recipe: Recipe, model: ModelSpec) -> Iterator[_Use]:
    for layer in model.full_layers:
        groups = recipe.head_groups(layer.index, layer.kv_heads, len(model.layers))
        for number, (spec, heads) in enumerate(groups):
            for side in SIDES:
                codec = getattr(spec, side)
                if codec.is_calibrated:
                    yield _Use(layer=layer, side=side, group=number, heads=heads, spec=codec, sinks=spec.tokens.sinks)
