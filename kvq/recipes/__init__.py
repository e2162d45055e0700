"""The shipped recipes, as data: YAML files of this folder, which ``kvq.recipe`` reads and checks."""

from importlib import resources

import yaml


def list_recipes() -> list[str]:
    """Names of the shipped recipes, in alphabetical order."""
    files = resources.files(__name__).iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def recipe_text(name: str) -> str:
    """The file of a shipped recipe."""
    return resources.files(__name__).joinpath(f"{name}.yaml").read_text()


def headline(name: str) -> dict[str, str]:
    """Name, summary and paper of a shipped recipe, without the torch that checking the rest of it takes."""
    data = yaml.safe_load(recipe_text(name))
    return {part: data.get(part, "") for part in ("name", "summary", "paper")}
