"""Put the results of an evaluation into the model card of an export."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvq.errors import CheckpointError
from kvq.eval.identity import model_hash
from kvq.export.exporter import is_export
from kvq.report.markdown import markdown_report, with_section

CARD = "README.md"


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


def check_results(folder: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Refuse results of another recipe or of other weights."""
    config = json.loads((folder / "config.json").read_bytes())
    recipe = config["quantization_config"]["recipe_hash"]
    weights = model_hash(folder)
    for result in results:
        name = result["recipe"]["name"]
        if result["recipe_hash"] != recipe:
            raise CheckpointError(
                f"these results are of recipe {name!r} as it was with hash {result['recipe_hash'][:12]}, and "
                f"{folder.name!r} has another one: evaluate this export."
            )
        if result["hashes"]["model"] != weights:
            raise CheckpointError(f"these results are of other weights than those of {folder.name!r}: evaluate it.")
        if result["partial"]:
            raise CheckpointError("these results are of an interrupted run: finish it, then put them into the card.")
