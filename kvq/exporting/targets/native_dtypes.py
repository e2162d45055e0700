"""Cache dtypes that engines compute by themselves: which recipes they store, and how a folder is served with them."""

from kvq.exporting.engines import Release, engines, find_release
from kvq.exporting.targets.base import Target
from kvq.recipe import Recipe


def native_dtype(recipe: Recipe, release: Release) -> str | None:
    """The cache dtype of an engine that stores what a recipe's codecs say, up to how scales are kept; None for none.

    Transforms do not matter here: they are in the weights, or the recipe is refused.
    """
    if recipe.layers or recipe.tokens.sinks or recipe.tokens.window:
        return None
    for name, own in release.own.items():
        if all((s.codec, s.token_dtype_bits) == (own.codec, own.bits) for s in (recipe.key, recipe.value)):
            return name
    return None


def takes(target: Target, recipe: Recipe) -> str | None:
    """The cache dtype with which the target's engine serves a recipe; None if the folder must hold scales instead."""
    engine = target.engines[0]
    return native_dtype(recipe, find_release(engine)) if target.name == engine else None


def engine_of(recipe: Recipe) -> str | None:
    """An engine that has a cache dtype for the codecs of a recipe; None if none has."""
    return next((name for name in engines() if native_dtype(recipe, find_release(name))), None)


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
