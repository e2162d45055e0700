"""The shipped recipes, as data: YAML files of this folder, which ``kvq.recipe`` reads and checks."""

import json
from importlib import resources
from typing import Any

import yaml

# A recipe that is fitted to keys after RoPE says so itself (``Recipe.is_bound_to_positions``, which is compared).
CONTEXTS, CALIBRATED = "contexts", "calibrated"


def list_recipes() -> list[str]:
    """Names of the shipped recipes, in alphabetical order."""
    files = resources.files(__name__).iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def recommended() -> list[dict[str, Any]]:
    """The recipes to begin with, the smallest first, with what was measured of the embedded model on a CPU.

    Each has name, role, bits (codes and metadata), kl (nats a token, windows of ``tokens``), and speed: tokens/s at
    ``context`` tokens beside a plain cache's. ``benchmarks/recipe_tables.py`` writes them from its results.
    """
    return json.loads(resources.files(__name__).joinpath("recommended.json").read_text())


def recipe_text(name: str) -> str:
    """The file of a shipped recipe."""
    return resources.files(__name__).joinpath(f"{name}.yaml").read_text()


def headline(name: str) -> dict[str, Any]:
    """Name, summary and paper of a shipped recipe, and whether it is bound to the positions of its calibration, without
    the torch that checking the rest of it takes."""
    data = yaml.safe_load(recipe_text(name))
    found = {part: data.get(part, "") for part in ("name", "summary", "paper")}
    return found | {"is_bound_to_positions": data.get(CONTEXTS) == CALIBRATED}
