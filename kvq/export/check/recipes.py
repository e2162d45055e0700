"""Which shipped recipes an engine can have on a model, and why it cannot have the others."""

from kvq.errors import KvqError
from kvq.export.engines import OwnDtype, Release
from kvq.export.targets.scheme import engine_view, refusal
from kvq.models.describe import ModelSpec
from kvq.recipe import Recipe, list_recipes, load_recipe


def recipes_in(release: Release, model: ModelSpec) -> dict[str, str]:
    """Shipped recipe -> 'how: ...' or 'no: ...'."""
    return {name: express(load_recipe(name), release, model) for name in list_recipes()}


def express(recipe: Recipe, release: Release, model: ModelSpec) -> str:
    """How an engine can have a recipe, or why not."""
    if "kvq" in release.readers:
        return "how: --target kvq, after 'import kvq'"
    if recipe.is_exact:
        return "how: any checkpoint without KV scales"
    try:
        reason = refusal(recipe, engine_view(model))
    except KvqError as error:
        reason = str(error)
    if reason is None:
        return f"how: --target {release.engine}, FP8 with scales from the checkpoint"
    near = [name for name, own in release.own.items() if _resembles(recipe, own)]
    hint = f"; nearest is its own {release.dtype_flag} {near[0]}, with scales of its own" if near else ""
    return f"no: {reason}{hint}"


def _resembles(recipe: Recipe, own: OwnDtype) -> bool:
    """True if a recipe stores what an engine's own cache dtype stores, up to the way scales are kept."""
    sides = (recipe.key, recipe.value)
    plain = not (recipe.layers or recipe.tokens.sinks or recipe.tokens.window or recipe.transforms.to_dict())
    if own.codec == "float8":
        return plain and all(side.codec == "float8" for side in sides)
    alike = all((side.codec, side.bits, side.axis) == ("affine", own.bits, "token") for side in sides)
    return plain and alike and all(side.group == "head" for side in sides)
