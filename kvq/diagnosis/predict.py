"""Errors and losses that recipes would cause, predicted from statistics alone.

A recipe's loss follows from the relative squared errors e^2 of its layers' attention (``error.py``):

    loss = LOSS (mean e^2) max(1, FEW_LAYERS / n)^(1/2)        nats per token

for n layers with full attention. Their errors are independent and average out; with fewer than FEW_LAYERS, less of them
does. LOSS was fitted on SmolLM2-135M-Instruct (``benchmarks/diagnosis.py``). Other models take the same errors better
or worse, so a prediction tells ruin from harm and harm from nothing, and is no measurement.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kvq.cache import make_plan
from kvq.cache.plan import CachePlan
from kvq.calib.artefacts import fit_artefacts, needed_artefacts
from kvq.calib.fit_source import FitSource
from kvq.calib.stats import Stats
from kvq.diagnosis.causes import FEW_LAYERS
from kvq.diagnosis.error import attention_error
from kvq.diagnosis.sample_tokens import LayerTokens, layer_tokens
from kvq.errors import DataError, RecipeError, UnsupportedModelError
from kvq.models.architecture import Attention
from kvq.pages.layout import SIDES
from kvq.recipe import Recipe, load_recipe

LOSS = 2.0
# What a recipe may cost (nats per token) to be good, and from where on a model is of no use.
GOOD, COLLAPSE = 0.05, 0.5
WIDTHS = (2, 3, 4, 8)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a recipe would do to a model.

    bits     per element in the long run, metadata included; NaN if the recipe was not tried.
    errors   layer -> e^2; 0 for layers that stay exact.
    loss     predicted, nats per token; NaN if the recipe was not tried.
    why_not  why it was not tried, else empty.
    """

    recipe: str
    bits: float = float("nan")
    errors: Mapping[int, float] = ()
    loss: float = float("nan")
    why_not: str = ""

    @property
    def verdict(self) -> str:
        if self.why_not:
            return "unknown"
        return "good" if self.loss <= GOOD else "lossy" if self.loss < COLLAPSE else "collapse"

    @property
    def worst_layer(self) -> int:
        return max(self.errors, key=lambda index: self.errors[index])


def layers_of(stats: Stats) -> dict[int, LayerTokens]:
    """Tokens to try recipes on, of every full-attention layer. Raises DataError if the statistics hold too little."""
    spec = stats.spec()
    source = FitSource(spec, stats, None)
    found = {}
    for layer in spec.full_layers:
        if layer.index not in stats.layers:
            raise DataError(
                f"the statistics of {stats.model!r} have no layer {layer.index}: run 'kvq calibrate' on this model."
            )
        attention = source.attention.get(layer.index) or Attention(index=layer.index, scaling=layer.head_dim**-0.5)
        rope = source.rope if attention.rotary else None
        found[layer.index] = layer_tokens(stats.layers[layer.index], rope, attention.scaling, seed=layer.index)
    return found


def plan_of(recipe: Recipe, stats: Stats, folder: Path | None = None) -> CachePlan:
    """What the recipe stores, fitted on the statistics. ``folder``: the checkpoint, for what reads weights.

    Raises RecipeError or DataError if it does not fit, or if the statistics lack what it reads.
    """
    spec = stats.spec()
    artefacts = fit_artefacts(recipe, spec, stats, folder) if needed_artefacts(recipe, spec) else None
    return make_plan(recipe, spec, artefacts)


def predict(recipe: Recipe, stats: Stats, layers: Mapping[int, LayerTokens], folder: Path | None = None) -> Prediction:
    """What a recipe would do; a recipe that cannot be tried says why. ``layers``: ``layers_of(stats)``."""
    try:
        plan = plan_of(recipe, stats, folder)
    except (DataError, RecipeError, UnsupportedModelError) as error:
        return Prediction(recipe=recipe.name, why_not=str(error))
    errors = {index: attention_error(plan.layers.get(index, ()), tokens) for index, tokens in layers.items()}
    return Prediction(recipe=recipe.name, bits=plan.bits_per_element, errors=errors, loss=predicted_loss(errors))


def predicted_loss(errors: Mapping[int, float]) -> float:
    """Nats per token from e^2 of all full-attention layers."""
    mean = sum(errors.values()) / len(errors)
    return LOSS * mean * max(1.0, FEW_LAYERS / len(errors)) ** 0.5


def bit_errors(
    stats: Stats, layers: Mapping[int, LayerTokens], recipe: Recipe | None = None, folder: Path | None = None
) -> dict[int, dict[str, dict[int, float]]]:
    """e^2 by layer, side and bit width, the other side exact: what mixed precision is chosen by.

    recipe   whose codecs are used at other widths; None: kivi2. Raises RecipeError if they have no widths.
    """
    recipe = recipe or _kivi_for(stats)
    found = {index: {side: {} for side in SIDES} for index in layers}
    for width in WIDTHS:
        plan = plan_of(_at_width(recipe, width), stats, folder)
        for index, tokens in layers.items():
            for side in SIDES:
                found[index][side][width] = attention_error(plan.layers.get(index, ()), tokens, (side,))
    return found


def _kivi_for(stats: Stats) -> Recipe:
    """kivi2, with groups of whole heads where its own do not divide them."""
    recipe = load_recipe("kivi2")
    divides = all(layer.head_dim % recipe.value.group == 0 for layer in stats.spec().full_layers)
    return recipe if divides else recipe.override({"value.group": "head"})


def _at_width(recipe: Recipe, width: int) -> Recipe:
    try:
        return recipe.override({"key.bits": width, "value.bits": width})
    except RecipeError:
        raise RecipeError(
            f"recipe {recipe.name!r} does not take {width} bits for keys and values, so errors per bit width are shown "
            "for recipes such as kivi2."
        ) from None
