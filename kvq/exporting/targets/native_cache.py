"""Folders for an engine's own cache dtype: the transforms are in the weights, and the engine computes all scales.

Nothing in such a folder names kvq or a quantization to the engine: it is a checkpoint of the base architecture, and the
flag of the serve command says how its cache is stored.
"""

from kvq.errors import RecipeError
from kvq.exporting.checkpoint import PROVENANCE, RECIPE, to_json
from kvq.exporting.engines import find_release
from kvq.exporting.folding import folded_field
from kvq.exporting.model_card import plain_card
from kvq.exporting.targets.base import Job, Target
from kvq.exporting.targets.native_dtypes import native_dtype, serve_section
from kvq.exporting.targets.plain import refuse_not_folded
from kvq.models.resolve import INDEX_FILE
from kvq.recipe import Recipe


def takes(target: Target, recipe: Recipe) -> str | None:
    """The cache dtype with which the target's engine serves a recipe; None if the folder must hold scales instead."""
    engine = target.engines[0]
    return native_dtype(recipe, find_release(engine)) if target.name == engine else None


def contents(target: Target, job: Job, dtype: str, index: bytes) -> dict[str, bytes]:
    """Every file but weights and companions. Raises RecipeError for transforms that do not fold.

    dtype   ``takes(target, recipe)``; index: of the weights.
    """
    recipe, release = job.plan.recipe, find_release(target.engines[0])
    if not recipe.transforms.to_dict():
        raise RecipeError(
            f"recipe {recipe.name!r} needs no export for {release.title}, which stores that by itself: "
            f"{release.command('MODEL', dtype)}"
        )
    refuse_not_folded(job.plan, job.folds, target.name)
    card = plain_card(job.plan, job.check, job.provenance, job.licence, serve=serve_section(job.folder, dtype, release))
    return {
        "config.json": to_json({**job.config, **folded_field(job)}),
        INDEX_FILE: index,
        RECIPE: recipe.to_yaml().encode(),
        PROVENANCE: to_json(dict(sorted({**job.provenance, "target": target.name}.items()))),
        "README.md": card.encode(),
    }
