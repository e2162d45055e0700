"""From a recipe to what an engine's FP8 cache needs: one scale a layer and side, or a refusal that says why.

Engines have one FP8 cache: E4M3, stored = value / scale, every token alike. What a recipe asks for beyond that cannot
be expressed in a checkpoint that they read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from kvq.calib.artefacts import artefact_name
from kvq.errors import RecipeError
from kvq.heads import HeadSpec
from kvq.models.describe import ModelSpec
from kvq.pages.layout import SIDES
from kvq.recipe import Recipe
from kvq.transforms.fold_plan import FoldPlan


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """FP8 scales by layer and side.

    scales       layer -> side -> float32 [1] or [kv_heads]; each is also a bfloat16 number, because some readers keep
                 scales in the model's dtype and rounding down would clip the largest numbers.
    granularity  ``tensor`` or ``head``.
    exact        layers that the engine must be told to keep in 16 bits.
    windows      True if every sliding-window layer must be kept in 16 bits.
    """

    scales: Mapping[int, Mapping[str, torch.Tensor]]
    granularity: str
    exact: tuple[int, ...] = ()
    windows: bool = False

    @property
    def skipped(self) -> tuple[str, ...]:
        """What an engine's flag for unquantized layers takes."""
        return (*map(str, self.exact), *(("sliding_window",) if self.windows else ()))


def engine_view(model: ModelSpec) -> ModelSpec:
    """The model as engines see it: a sliding-window layer's cache is quantized like any other."""
    layers = tuple(replace(la, kind="full", window=None) if la.kind == "sliding" else la for la in model.layers)
    return replace(model, layers=layers)


def refusal(recipe: Recipe, model: ModelSpec, folds: FoldPlan | None = None) -> str | None:
    """Why an engine's FP8 cache cannot express a recipe on a model, as the end of a sentence; None if it can.

    folds   what of the recipe's transforms the weights have taken over; None: whatever they can.
    """
    quantized = 0
    for layer in model.full_layers:
        specs = {recipe.for_head(layer.index, head, len(model.layers)) for head in range(layer.kv_heads)}
        folded = folds.folded.get(layer.index, {}) if folds else None
        left = folds.left.get(layer.index, {}) if folds else {}
        reasons = [reason for spec in specs if (reason := _spec_refusal(spec, folded, left))]
        if reasons:
            return f"{reasons[0]} (layer {layer.index})"
        if len(specs) > 1:
            return f"heads of one layer are stored in different ways (layer {layer.index})"
        quantized += not next(iter(specs)).is_exact
    return None if quantized else "nothing is quantized"


def fp8_scheme(
    recipe: Recipe,
    model: ModelSpec,
    artefacts: Mapping[str, torch.Tensor],
    folds: FoldPlan | None = None,
    instead: str = "kvq",
) -> Scheme:
    """Scales for every full-attention layer of ``model`` that the recipe quantizes.

    artefacts   ``scale`` of each layer and side, as ``kvq.calib.artefacts.fit_artefacts`` makes them.
    instead     a target that takes the recipe, for the refusal.

    Raises RecipeError for a recipe that an FP8 cache cannot express.
    """
    reason = refusal(recipe, model, folds)
    if reason:
        raise RecipeError(
            f"recipe {recipe.name!r} cannot be written for a serving engine: {reason}, and their checkpoints express "
            f"FP8 with calibrated scales only; use --recipe fp8, or --target {instead}."
        )
    scales, exact, granularities = {}, [], set()
    for layer in model.full_layers:
        spec = recipe.for_head(layer.index, 0, len(model.layers))
        if spec.is_exact:
            exact.append(layer.index)
            continue
        granularities.add("head" if spec.key.has_head_scales else "tensor")
        scales[layer.index] = {
            side: round_up(artefacts[artefact_name(layer.index, side, "scale")]).reshape(-1) for side in SIDES
        }
    if len(granularities) > 1:
        raise RecipeError(
            f"recipe {recipe.name!r} has one scale a head in some layers and one a tensor in others, and a checkpoint "
            "declares one of them for all: use the same granularity everywhere."
        )
    return Scheme(scales=scales, granularity=granularities.pop(), exact=tuple(exact))


def round_up(scale: torch.Tensor) -> torch.Tensor:
    """The smallest bfloat16 numbers that are not below positive ``scale``, as float32."""
    rounded = scale.to(torch.bfloat16)
    below = rounded.to(torch.float64) < scale.to(torch.float64)
    # The next bfloat16 number of a positive one is the next bit pattern.
    return (rounded.view(torch.int16) + below.to(torch.int16)).view(torch.bfloat16).to(torch.float32)


def _spec_refusal(spec: HeadSpec, folded: Mapping[str, int] | None, left: Mapping[str, str]) -> str | None:
    if spec.is_exact:
        return None
    for side in SIDES:
        codec = getattr(spec, side)
        obstacle = codec.engine_obstacle(side)
        if obstacle:
            return obstacle
        steps = getattr(spec.transforms, side)
        if folded is not None and len(steps) > folded.get(side, 0):
            kind = steps[folded.get(side, 0)].kind
            because = f", because {left[side]}" if side in left else ""
            return f"{side}s go through the transform {kind!r} while the model runs{because}"
    if spec.key.has_head_scales != spec.value.has_head_scales:
        return "keys and values differ in granularity"
    if spec.tokens.sinks or spec.tokens.window:
        return f"the first {spec.tokens.sinks} and the last {spec.tokens.window} tokens stay exact"
    return None
