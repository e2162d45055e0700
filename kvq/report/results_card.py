"""Put the results of an evaluation into the model card of an export."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvq.errors import CheckpointError
from kvq.eval.identity import model_hash
from kvq.exporting.exporter import KVQ_TARGET, is_export
from kvq.exporting.model_card import CARD
from kvq.models.resolve import resolve_model
from kvq.recipe import Recipe
from kvq.report.load import load_results
from kvq.report.markdown import markdown_report, with_section


def card_with_results(folder: str | Path, results: Sequence[Mapping[str, Any]]) -> str:
    """The card of an export with a section on these results, in place of an earlier one.

    Raises CheckpointError if the folder is no export, has no card, or the results are of another recipe or model.
    """
    folder = Path(folder)
    if not folder.is_dir() or not is_export(folder):
        raise CheckpointError(f"{str(folder)!r} is no export of kvq: give a folder that 'kvq export' wrote.")
    check_results(folder, results)
    try:
        card = (folder / CARD).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise CheckpointError(f"{folder.name!r} has no readable {CARD}: repeat 'kvq export'.") from None
    return with_section(card, markdown_report(results))


def card_of(
    model: str | Path, recipe: Recipe, files: Sequence[str | Path], target: str = KVQ_TARGET
) -> Callable[[str], str]:
    """What puts results of ``model`` under ``recipe`` into the card of the export that is about to be written.

    Raises CheckpointError if the files hold none, or those of another recipe or model, and for a target whose cache is
    not kvq's.
    """
    if target != KVQ_TARGET:
        raise CheckpointError(f"results are of kvq's own cache, which target {target!r} has not: leave them out.")
    folder, results = resolve_model(model), load_results(files)
    _check(results, recipe.hash, model_hash(folder), f"model {folder.name!r} with recipe {recipe.name!r}")
    return lambda card: with_section(card, markdown_report(results))


def check_results(folder: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Refuse results of another recipe or of other weights."""
    config = json.loads((folder / "config.json").read_bytes())
    _check(results, config["quantization_config"]["recipe_hash"], model_hash(folder), repr(folder.name))


def _check(results: Sequence[Mapping[str, Any]], recipe: str, weights: str, subject: str) -> None:
    for result in results:
        name = result["recipe"]["name"]
        if result["recipe_hash"] != recipe:
            raise CheckpointError(
                f"these results are of recipe {name!r} as it was with hash {result['recipe_hash'][:12]}, and {subject} "
                "has another one: evaluate it."
            )
        if result["hashes"]["model"] != weights:
            raise CheckpointError(f"these results are of other weights than those of {subject}: evaluate it.")
        if result["partial"]:
            raise CheckpointError("these results are of an interrupted run: finish it, then put them into the card.")
