"""Read result files: what ``kvq eval --json`` and ``kvq compare --json`` write."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvq.errors import CheckpointError
from kvq.eval.result import SCHEMA_VERSION

# What a page cannot do without.
_NEEDED = ("recipe", "results", "mode", "bits_per_element", "bits_tokens", "asymptotic_bits", "model", "hashes")


def load_results(files: Sequence[str | Path]) -> list[dict[str, Any]]:
    """The results in the files, in their order. Raises CheckpointError for a file that is none of ours."""
    return [result for file in files for result in _load(Path(file))]


def _load(file: Path) -> list[dict[str, Any]]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        why = getattr(error, "strerror", None) or "it is no JSON"
        raise CheckpointError(
            f"result file {str(file)!r} cannot be read ({why}): give what 'kvq eval --json FILE' wrote."
        ) from None
    if not isinstance(data, dict) or "schema_version" not in data:
        raise CheckpointError(f"{file.name!r} holds no result of kvq: give what 'kvq eval --json FILE' wrote.")
    if data["schema_version"] != SCHEMA_VERSION:
        raise CheckpointError(
            f"{file.name!r} has results of schema {data['schema_version']}, and this release reads {SCHEMA_VERSION}: "
            "run the evaluation again."
        )
    runs = data.get("runs", [data])
    for run in runs:
        missing = [name for name in _NEEDED if name not in run]
        if missing:
            raise CheckpointError(f"{file.name!r} lacks {missing[0]!r}: run the evaluation again.")
    return runs


def differences(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why results should not be compared with each other, in sentences; empty if nothing stands against it."""
    facts = {
        "modes": [result["mode"] for result in results],
        "baselines": [result["hashes"]["baseline"] for result in results],
        "texts": [(result["data"] or {}).get("sha256") for result in results],
        "windows": [(result["seq_len"], result["windows"]) for result in results if result["windows"]],
        "precisions": [result["dtype"] for result in results],
    }
    said = []
    for what, values in facts.items():
        if len(set(values)) > 1:
            said.append(f"These runs have different {what}: compare each with its own baseline only.")
    asked: dict[str, set[Any]] = {}
    for result in results:
        for task, found in result["results"].items():
            if "samples" in found:
                asked.setdefault(task, set()).add((found["samples"], found["fewshot"], found["mode"]))
    differ = [task for task, ways in asked.items() if len(ways) > 1]
    if differ:
        said.append(f"Not every run was asked the same on {', '.join(differ)}.")
    return said
