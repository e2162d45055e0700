"""The recipes that a search found for the embedded model: their evidence belongs to them, and says that they won."""

import json
from pathlib import Path

import pytest

from kvq.recipe import load_recipe, parse_recipe

FOLDER = Path(__file__).parents[1] / "examples/auto"
FOUND = sorted(FOLDER.glob("*.yaml"))


def test_there_is_one_for_each_size():
    assert {float(path.stem.removeprefix("auto-")) for path in FOUND} == {4.5, 3.25, 2.5, 2.0}


@pytest.mark.parametrize("path", FOUND, ids=lambda path: path.stem)
def test_evidence_is_of_this_recipe(path):
    proof = json.loads(path.with_name(f"{path.stem}.evidence.json").read_text())
    budget, recipe = float(path.stem.removeprefix("auto-")), load_recipe(str(path))
    assert proof["recipe_hash"] == recipe.hash
    assert proof["bits"] <= proof["budget"] == budget
    assert recipe.tokens.window <= 128
    assert recipe.tokens.sinks <= 4
    # Measured on windows that neither sensitivities nor the choice have seen, and better than the uniform ones there,
    # with transforms fitted to the calibration text and with those fitted to another.
    windows = [number for text in proof["text"]["search"] for part in text["windows"].values() for number in part]
    assert len(set(windows)) == len(windows)
    assert proof["lost"] is None
    assert len(proof["held_out"]) == 2
    for text in proof["held_out"].values():
        assert text["found"]["kl"] < text["uniform"]["kl"]
        assert text["found_refitted"]["kl"] < text["uniform_refitted"]["kl"]
    assert {parse_recipe(row["recipe"], source=path.name).hash for row in proof["chosen_from"] if row["recipe"]}
    # Every number that was not measured is marked.
    rows = [row for unit in proof["table"].values() for option, row in unit.items() if option != "heads"]
    assert {row[2] for row in rows} == {True, False}
    assert proof["solver"]["gap"] < 0.01
