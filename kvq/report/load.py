"""Read result files: what ``kvq eval --json`` and ``kvq compare --json`` write."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from kvq.errors import CheckpointError
from kvq.eval.result import SCHEMA_VERSION, EvalResult

# What a page cannot do without.
_NEEDED = tuple(field.name for field in fields(EvalResult))


# What must agree in results that are shown as one, and what describes the text that one of them scored.
_SAME = ("model", "baseline", "recipe_hash", "hashes", "mode", "chunk", "seed", "dtype", "device", "cache_dtype")
_OF_TEXT = ("data", "seq_len", "stride", "windows", "tokens", "packed_share", "bits_per_element", "bits_tokens")


def load_results(files: Sequence[str | Path]) -> list[dict[str, Any]]:
    """The results in the files, in their order; those of one recipe that ran different tasks are joined.

    Raises CheckpointError for a file that is none of ours.
    """
    return joined([result for file in files for result in _load(Path(file))])


def joined(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Results as they are, but for those of the same recipe, weights, mode and code that have no task in common: these
    become one, with the commands of all."""
    found: list[dict[str, Any]] = []
    for result in results:
        place = next((i for i, other in enumerate(found) if _fit(other, result)), None)
        if place is None:
            found.append(dict(result))
        else:
            found[place] = _join(found[place], result)
    return found


def _fit(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    if any(one[name] != other[name] for name in _SAME) or set(one["results"]) & set(other["results"]):
        return False
    shared = set(one["versions"]) & set(other["versions"])
    if any(one["versions"][name] != other["versions"][name] for name in shared):
        return False
    # Of two texts one would have to be forgotten.
    return not (one["data"] and other["data"]) or all(one[name] == other[name] for name in _OF_TEXT)


def _join(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    text = other if other["data"] else one
    commands = dict.fromkeys(line for own in (one, other) for line in own["command"].split("\n") if line)
    return {
        **one,
        **{name: text[name] for name in _OF_TEXT},
        "results": {**one["results"], **other["results"]},
        "partial": one["partial"] or other["partial"],
        "unfinished": [*one["unfinished"], *other["unfinished"]],
        "versions": {**one["versions"], **other["versions"]},
        "command": "\n".join(commands),
    }


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


def commands_of(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """The commands that repeat the results, each once."""
    return list(dict.fromkeys(line for result in results for line in result["command"].split("\n") if line))
