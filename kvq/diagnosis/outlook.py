"""What quantization would do to a model: the diagnosis of its statistics, and what pictures show."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvq.cache import CachePlan
from kvq.calib.stats import Stats
from kvq.diagnosis.predict import bit_errors, plan_of
from kvq.diagnosis.recommendation import CANDIDATES, Diagnosis, diagnose
from kvq.diagnosis.sample_tokens import LayerTokens
from kvq.errors import RecipeError
from kvq.recipe import Recipe, load_recipe

# Recipes whose transforms are shown when none is asked for, best first.
_SHOWN = ("klt3", "turboquant4")
# Whose bit widths are tried where no recipe is asked for, or its codecs take no other widths.
_WIDTHS_OF = "kivi2"


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What quantization would do to a model.

    errors, widths_of   layer -> side -> bits -> error (``kvq.diagnosis.bit_errors``), with the recipe of that name.
    shown               the plan whose transforms pictures show; None if none that can be fitted has any.
    """

    stats: Stats
    layers: Mapping[int, LayerTokens]
    diagnosis: Diagnosis
    errors: Mapping[int, Mapping[str, Mapping[int, float]]]
    widths_of: str
    shown: CachePlan | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "diagnosis": self.diagnosis.to_dict(),
            "bit_errors": {"recipe": self.widths_of, "layers": self.errors},
        }


def outlook_of(
    stats: Stats,
    layers: Mapping[int, LayerTokens],
    recipe: Recipe | None = None,
    folder: Path | None = None,
    *,
    pictures: bool = False,
    progress: Callable[..., None] | None = None,
) -> Outlook:
    """Predict the shipped candidates, and ``recipe`` with them.

    layers     ``layers_of(stats)``.  folder   the model's checkpoint, for transforms that read weights.
    pictures   also fit the plan whose transforms pictures show.

    Raises RecipeError for a recipe that cannot be predicted.
    """
    recipes = [load_recipe(name) for name in CANDIDATES]
    if recipe is not None and recipe.hash not in {own.hash for own in recipes}:
        recipes.insert(0, recipe)
    found = diagnose(stats, recipes, folder=folder, layers=layers, progress=progress)
    errors, widths_of = _bit_errors(stats, layers, recipe, folder)
    for own in found.predictions:
        if recipe is not None and own.recipe == recipe.name and own.why_not:
            raise RecipeError(f"recipe {recipe.name!r} cannot be predicted: {own.why_not}")
    shown = _shown_plan(stats, found, recipe, folder) if pictures else None
    return Outlook(stats=stats, layers=layers, diagnosis=found, errors=errors, widths_of=widths_of, shown=shown)


def _bit_errors(stats: Stats, layers, recipe: Recipe | None, folder: Path | None):
    """Of the recipe asked for where its codecs take other widths, else of kivi2."""
    if recipe is not None:
        try:
            return bit_errors(stats, layers, recipe, folder), recipe.name
        except RecipeError:
            pass
    return bit_errors(stats, layers), _WIDTHS_OF


def _shown_plan(stats: Stats, found: Diagnosis, recipe: Recipe | None, folder: Path | None) -> CachePlan | None:
    if recipe is not None:
        return plan_of(recipe, stats, folder)
    best = found.recommended.recipe if found.recommended else None
    fitted = {p.recipe for p in found.predictions if not p.why_not}
    for name in (best, *_SHOWN):
        if name is not None and name in fitted:
            plan = plan_of(load_recipe(name), stats, folder)
            if plan.has_transforms:
                return plan
    return None
