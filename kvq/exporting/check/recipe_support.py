"""Which shipped recipes an engine can have on a model, and why it cannot have the others."""

import functools
from collections.abc import Mapping

from kvq.errors import KvqError
from kvq.exporting.engines import Release
from kvq.exporting.targets.native_dtypes import native_dtype
from kvq.exporting.targets.scheme import engine_view, refusal
from kvq.models.describe import ModelSpec
from kvq.recipe import Recipe, list_recipes, load_recipe


def recipes_in(release: Release, model: ModelSpec) -> dict[str, str]:
    """Shipped recipe -> 'how: ...' or 'no: ...'."""
    return {name: express(recipe, release, model) for name, recipe in _shipped().items()}


@functools.cache
def _shipped() -> Mapping[str, Recipe]:
    """Reading dozens of YAML files takes longer than the rest of a check."""
    return {name: load_recipe(name) for name in list_recipes()}


def express(recipe: Recipe, release: Release, model: ModelSpec) -> str:
    """How an engine can have a recipe, or why not."""
    if "kvq" in release.readers:
        return "how: --target kvq, after 'import kvq'"
    if recipe.is_exact:
        return "how: any checkpoint without KV scales"
    try:
        reason = refusal(recipe, engine_view(model)) or _unread(release, model)
    except KvqError as error:
        reason = str(error)
    if reason is None:
        return f"how: --target {release.engine}, FP8 with scales from the checkpoint"
    dtype = native_dtype(recipe, release)
    if dtype is None:
        return f"no: {reason}"
    if recipe.transforms.to_dict():
        return f"how: --target {release.engine}, transforms in the weights, served with {release.dtype_flag} {dtype}"
    return f"no: {reason}; nearest is its own {release.dtype_flag} {dtype}, with scales of its own"


def _unread(release: Release, model: ModelSpec) -> str | None:
    """Why an engine reads no scales of a model's architecture, as the end of a sentence; None if it does."""
    architecture = (model.config.architectures or ["?"])[0]
    if release.architectures is None or architecture in release.architectures:
        return None
    return f"it loads no KV scales for {architecture}"
