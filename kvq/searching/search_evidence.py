"""What a search found, as plain data: the evidence beside a recipe, and the front for pictures."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import yaml

from kvq.recipe import Recipe
from kvq.searching.outcome import Candidate, Point, Search
from kvq.searching.sensitivity import Entry
from kvq.searching.verify import Measured

SCHEMA_VERSION = 2


def evidence(found: Search, point: Point, command: Sequence[str]) -> dict[str, Any]:
    """All that was measured and predicted for one budget, and how to measure it again.

    ``predicted`` numbers are sums of single-layer damages; only what stands under ``measured`` and ``confirmed`` was
    measured on the whole recipe. ``held_out``: the texts that chose nothing, each with the statistics given and, as
    ``..._refitted``, with those of the windows that chose. ``lost``: what led until then, if the uniform recipe won.
    """
    chosen = point.chosen
    return {
        "schema_version": SCHEMA_VERSION,
        "recipe": chosen.recipe.name,
        "recipe_hash": chosen.recipe.hash,
        "command": shlex.join(command),
        "budget": point.budget,
        "bits": chosen.bits,
        "bits_of": _what_bits(found),
        "filled_bits": {"tokens": found.settings.seq_len, "bits_per_element": point.filled_bits},
        "metric": found.settings.metric,
        "floors": dict(found.settings.floors),
        "confirmed": asdict(point.confirmed),
        "held_out": {name: asdict(text) for name, text in point.held_out.items()},
        "lost": candidate_row(point.lost) if point.lost else None,
        "best_uniform": _uniform(point),
        "chosen_from": [candidate_row(candidate) for candidate in point.candidates],
        "solver": _solver(chosen),
        "time_limit": found.settings.time_limit,
        "complete": found.complete,
        "seconds_measuring": round(found.seconds, 1),
        **found.facts,
        "left_out": dict(found.left_out),
        "table": table_rows(found.table),
    }


def candidate_row(candidate: Candidate) -> dict[str, Any]:
    return {
        "how": candidate.how,
        "recipe_hash": candidate.recipe.hash,
        "recipe": candidate.recipe.to_dict() if candidate.how == "uniform" else None,
        "bits": candidate.bits,
        "predicted": candidate.predicted,
        "measured": asdict(candidate.measured) if candidate.measured else None,
    }


def table_rows(table: Sequence[Entry]) -> dict[str, dict[str, list[Any]]]:
    """By side and layer: option -> [bits, damage, measured?]; shares of heads under ``heads``."""
    rows: dict[str, dict[str, Any]] = {}
    for entry in table:
        policy = f" policy {entry.policy}" if entry.policy else ""
        row = rows.setdefault(f"{entry.side} {entry.layer}{policy}", {})
        if entry.shares:
            row["heads"] = [round(share, 4) for share in entry.shares]
        row[entry.option] = [round(entry.bits, 4), float(f"{entry.damage:.6g}"), entry.measured]
    return rows


def front_rows(found: Search) -> dict[str, Any]:
    """Points of the picture: bits, KL and what they are; measured on the choosing part."""

    def row(candidate: Candidate, budget: float | None) -> dict[str, Any]:
        return {**candidate_row(candidate), "name": candidate.recipe.name, "budget": budget}

    return {
        "metric": found.settings.metric,
        "bits_of": _what_bits(found),
        "model": found.facts["model"],
        "text": " and ".join(row["source"] for row in found.facts["text"]["search"]),
        "front": [row(candidate, None) for candidate in found.front],
        "points": [_point_row(point, row(point.chosen, point.budget)) for point in found.points],
        "uniform": [row(c, p.budget) for p in found.points for c in p.candidates if c.how == "uniform"],
        "layers": damage_by_layer(found.table),
    }


def _point_row(point: Point, row: dict[str, Any]) -> dict[str, Any]:
    again = [text.found_refitted for text in point.held_out.values()] if point.lost is None else []
    refitted = Measured.pooled(again).kl if again and None not in again else None
    return {**row, "confirmed": asdict(point.confirmed), "refitted_kl": refitted, "uniform_won": point.lost is not None}


def damage_by_layer(table: Sequence[Entry]) -> dict[str, list[dict[str, Any]]]:
    """What the smallest measured option of each side and layer costs."""
    least: dict[tuple[str, int], Entry] = {}
    for entry in table:
        key = entry.side, entry.layer
        if entry.measured and entry.policy == 0 and (key not in least or entry.bits < least[key].bits):
            least[key] = entry
    rows: dict[str, list[dict[str, Any]]] = {"key": [], "value": []}
    for (side, layer), entry in sorted(least.items()):
        rows[side].append({"layer": layer, "option": entry.option, "bits": entry.bits, "damage": entry.damage})
    return rows


def recipe_text(recipe: Recipe, point: Point, evidence_name: str) -> str:
    """The recipe file: a comment that says what was measured, and the recipe."""
    confirmed = point.confirmed
    error = "" if confirmed.kl_stderr is None else f" ± {confirmed.kl_stderr:.5f}"
    lines = [
        f"# Found by 'kvq search' at a budget of {point.budget:g} bits; measured on text that chose nothing:",
        f"# KL {confirmed.kl:.5f}{error} nats a token, top-1 {confirmed.top1:.4f}, {point.chosen.bits:.3f} bits.",
        f"# How, and how to measure it again: {evidence_name}",
    ]
    if point.lost is not None:
        lines.insert(2, "# One way for all layers won: bits by layer did not lead on every held-out text.")
    return (
        "\n".join(lines) + "\n" + yaml.safe_dump(recipe.to_dict(), sort_keys=False, width=100, default_flow_style=None)
    )


def _uniform(point: Point) -> dict[str, Any] | None:
    if point.uniform is None:
        return None
    return {**candidate_row(point.uniform), "confirmed": asdict(point.uniform_confirmed)}


def _solver(chosen: Candidate) -> dict[str, Any] | None:
    if chosen.allocation is None:
        return None
    facts = asdict(chosen.allocation)
    del facts["choices"]
    interpolated = sum(not choice.entry.measured for choice in chosen.allocation.choices)
    return {"name": "scipy.optimize.milp (HiGHS)", **facts, "interpolated_choices": interpolated}


def _what_bits(found: Search) -> str:
    if found.settings.tokens is None:
        return "asymptotic: codes and all metadata, without exact tokens"
    return f"a filled cache of {found.settings.tokens} tokens, exact tokens included"
