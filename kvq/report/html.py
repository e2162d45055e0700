"""Results as one HTML page that needs nothing else: no network, no script, light and dark."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from kvq.report.charts import charts_of, head_maps, needle_maps
from kvq.report.load import commands_of, differences
from kvq.report.page import render
from kvq.report.rows import Row, Size, names_of, number, side_by_side, sizes_of
from kvq.report.tables import size
from kvq.report.verdict import overall, question, verdict_of

# Colours of the style sheet; results beyond them begin again.
COLOURS = 8


def html_report(results: Sequence[Mapping[str, Any]]) -> str:
    """The page for one result or several (``EvalResult.to_dict()``)."""
    names = names_of(results)
    known = zip(names, results, sizes_of(results))
    runs = [_run(name, i % COLOURS, result, size) for i, (name, result, size) in enumerate(known)]
    return render(
        "report.html.j2",
        brand="kvq evaluation",
        title=_title(names, results),
        summary=_summary(runs) if len(results) > 1 else None,
        overall=overall(names, results),
        runs=runs,
        notes=differences(results),
        charts=charts_of(names, results),
        needles=needle_maps(names, results),
        heads=head_maps(names, results),
        table=_table(results),
        memory=_memory(results),
        commands=commands_of(results),
        data=_embedded(results),
    )


def _title(names: Sequence[str], results: Sequence[Mapping[str, Any]]) -> str:
    models = list(dict.fromkeys(result["model"] for result in results))
    return f"{', '.join(names)} on {models[0]}" if len(models) == 1 else ", ".join(names)


def _run(name: str, colour: int, result: Mapping[str, Any], size: Size) -> dict[str, Any]:
    found = result["results"].get("divergence")
    return {
        "name": name,
        "colour": colour,
        "verdict": verdict_of(result),
        "question": question(result),
        "tiles": _tiles(result, size),
        "facts": _facts(result),
        "worst": found["worst"] if found and found["kl"] > 0 else None,
    }


def _tiles(result: Mapping[str, Any], at: Size) -> list[tuple[str, str, str]]:
    """(value, what, below) of the numbers that come first."""
    beside = f"{result['asymptotic_bits']:.2f} in the long run, 16 without kvq"
    tiles = [(f"{at.bits:.2f}", f"bits per element at {at.tokens:,} tokens", beside)]
    results = result["results"]
    if found := results.get("divergence"):
        error = found["kl_stderr"]
        spread = f"± {number(error, 4)} nats" if error is not None else "nats"
        tiles.append((number(found["kl"], 4), "KL from baseline", f"{spread}; worst 1% from {found['kl_p99']:.2f}"))
        tiles.append((f"{found['top1']:.1%}", "same next token", f"{found['top5']:.1%} within the first five"))
    if found := results.get("perplexity"):
        tiles.append((number(found["value"], 2), "perplexity", f"baseline {number(found['baseline'], 2)}"))
    if found := results.get("speed"):
        where = f"at {found['context']:,} tokens, on {result['device']}"
        tiles.append((f"{found['ratio']:.2f}x", "decoding speed", where))
    if result["memory"]:
        tiles.append((f"{16 / at.bits:.1f}x", "less cache memory", f"at {at.tokens:,} tokens"))
    return tiles


def _summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Sequence[Any]]:
    """The numbers that come first, a line a run."""
    columns = list(dict.fromkeys(what for run in runs for _, what, _ in run["tiles"]))
    tiles = [{what: value for value, what, _ in run["tiles"]} for run in runs]
    return {"columns": columns, "cells": [[own.get(column, "-") for column in columns] for own in tiles]}


def _facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    facts = [
        ("model", result["model"]),
        ("baseline", result["baseline"]),
        ("recipe", f"{result['recipe']['name']} ({result['recipe_hash'][:12]})"),
        ("mode", result["mode"] + (f", {result['chunk']} tokens a chunk" if result["chunk"] else "")),
        ("implementation", result["implementation"]),
        ("computed in", f"{result['dtype']} on {result['device']}; exact tokens counted as {result['cache_dtype']}"),
        ("bits, measured", f"{result['bits_per_element']:.2f} at {result['bits_tokens']:,} tokens, the scored length"),
        ("bits in the long run", f"{result['asymptotic_bits']:.2f}"),
    ]
    if result["data"]:
        data = result["data"]
        share = f"{result['packed_share']:.1%} of its scored tokens read quantized ones"
        text = f"{data['source']}, {result['windows']} windows of {result['seq_len']:,} tokens; {share}"
        facts.append(("text", f"{text} (SHA-256 {data['sha256'][:12]})"))
    for task, found in result["results"].items():
        data = found.get("data") or {}
        if "file" in data:
            facts.append((task, f"{data['file']} (SHA-256 {data['sha256'][:12]})"))
    facts += [
        ("seed", str(result["seed"])),
        ("weights", f"{result['hashes']['model'][:12]}, baseline {result['hashes']['baseline'][:12]}"),
        ("code", result["hashes"]["code"][:12]),
        ("versions", ", ".join(f"{name} {version}" for name, version in result["versions"].items())),
    ]
    return facts


def _table(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One line a measure: the baseline's value, and a cell for every result that has it."""
    lines, last = [], None
    for (task, measure), (baseline, found) in side_by_side(results, lambda row: (row.task, row.measure)).items():
        reach = max(_reach(row) for row in found if row)
        cells = [_cell(row, reach) for row in found]
        lines.append({"task": task if task != last else "", "measure": measure, "baseline": baseline, "cells": cells})
        last = task
    return lines


def _reach(row: Row) -> float:
    return max((abs(value) for value in (row.low, row.high, row.estimate) if value is not None), default=0.0)


def _cell(row: Row | None, reach: float) -> dict[str, Any] | None:
    if row is None:
        return None
    return {**vars(row), "bar": _bar(row, 1.1 * reach) if row.estimate is not None and reach > 0 else None}


def _bar(row: Row, reach: float) -> dict[str, Any]:
    """Where a difference and its interval stand on a line from -reach to reach, in % of its length."""
    at = lambda value: 50 * (1 + max(-1.0, min(1.0, value / reach)))  # noqa: E731
    known = row.low is not None and row.high is not None
    return {
        "kind": {"worse": "bad", "better": "good"}.get(row.verdict, "plain"),
        "at": at(row.estimate),
        "whisker": (at(row.low), at(row.high) - at(row.low)) if known else None,
        "title": f"difference {row.difference}: {row.verdict}",
    }


def _memory(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Cache bytes by length: the 16-bit cache, and every result's with its share of that."""
    lines = []
    for i, plain in enumerate(results[0]["memory"]):
        rows = [result["memory"][i] for result in results if len(result["memory"]) > i]
        cells = [(size(row["recipe_bytes"]), row["recipe_bytes"] / row["plain_bytes"]) for row in rows]
        lines.append({"tokens": f"{plain['tokens']:,}", "plain": size(plain["plain_bytes"]), "cells": cells})
    return lines


def _embedded(results: Sequence[Mapping[str, Any]]) -> Markup:
    """The results as JSON for a script element: nothing in it may end the element."""
    # JSON has no infinity; a perplexity may be one.
    text = json.dumps(json.loads(json.dumps(list(results), default=str), parse_constant=lambda _: None))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))
