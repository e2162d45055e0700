"""Folders for an engine's own cache dtype: the transforms are in the weights, and the engine computes all scales.

Nothing in such a folder names kvq or a quantization to the engine: it is a checkpoint of the base architecture, and the
flag of the serve command says how its cache is stored.
"""

from kvq.errors import RecipeError
from kvq.export.card import plain_card
from kvq.export.checkpoint import PROVENANCE, RECIPE, to_json
from kvq.export.engines import Release, engines, find_release
from kvq.export.folding import folded_field
from kvq.export.targets.base import Job, Target
from kvq.export.targets.plain import refuse_not_folded
from kvq.models.resolve import INDEX_FILE
from kvq.recipe import Recipe


def own_dtype(recipe: Recipe, release: Release) -> str | None:
    """The cache dtype of an engine that stores what a recipe's codecs say, up to how scales are kept; None for none.

    Transforms do not matter here: they are in the weights, or the recipe is refused.
    """
    if recipe.layers or recipe.tokens.sinks or recipe.tokens.window:
        return None
    for name, own in release.own.items():
        if all(_stores(side, own.codec, own.bits) for side in (recipe.key, recipe.value)):
            return name
    return None


def engine_of(recipe: Recipe) -> str | None:
    """An engine that has a cache dtype for the codecs of a recipe; None if none has."""
    return next((name for name in engines() if own_dtype(recipe, find_release(name))), None)


def takes(target: Target, recipe: Recipe) -> str | None:
    """The cache dtype with which the target's engine serves a recipe; None if the folder must hold scales instead."""
    engine = target.engines[0]
    return own_dtype(recipe, find_release(engine)) if target.name == engine else None


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


def serve_section(folder: str, dtype: str, release: Release) -> str:
    """How to serve a folder with the recipe's cache dtype, and with the engine's other ones."""
    own, others = release.own[dtype], [name for name in release.own if name != dtype]
    condition = f", {own.where}" if own.where else ""
    text = f"{release.title}, {own.bits} bits a number{condition}:\n\n```bash\n{release.command(folder, dtype)}\n```\n"
    if others:
        named = " and ".join(f"`{release.dtype_flag} {name}`" for name in others)
        text += f"\nThe same folder also serves with {named}.\n"
    if own.rotates:
        text += f"\n{release.title} rotates keys and values itself before it rounds them to {own.bits} bits.\n"
    return (
        f"\n## Serve it\n\n{text}\n{release.title} computes the scales of these caches token by token. The folder "
        f"holds none, so `{release.dtype_flag} fp8` would use 1.0.\n"
    )


def _stores(side, codec: str, bits: int) -> bool:
    if side.codec != codec:
        return False
    if codec == "float8":
        return side.scale == "unit" and set(side.to_dict()) <= {"codec", "scale"}
    plain = set(side.to_dict()) <= {"codec", "bits", "axis", "group", "symmetric"}
    return plain and (side.bits, side.axis, side.group) == (bits, "token", "head")
