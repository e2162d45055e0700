"""The shipped recipes, as data: YAML files of this folder, which ``kvq.recipe`` reads and checks."""

from importlib import resources


def list_recipes() -> list[str]:
    """Names of the shipped recipes, in alphabetical order."""
    files = resources.files(__name__).iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def recipe_text(name: str) -> str:
    """The file of a shipped recipe."""
    return resources.files(__name__).joinpath(f"{name}.yaml").read_text()
