"""Shipped recipes by what they are, for the tests that name those which something serves otherwise."""

from kvq.pages.layout import SIDES
from kvq.recipe import Recipe, list_recipes, load_recipe


def is_latent(recipe: Recipe) -> bool:
    """Whether less is stored than the model's numbers, or those of all heads together."""
    return any(step.loses for side in SIDES for step in getattr(recipe.transforms, side))


LATENT_RECIPES = [name for name in list_recipes() if is_latent(load_recipe(name))]
