"""Every shipped recipe on a model of another family: exported and scored, or refused with the reason.

    python benchmarks/second_model.py MODEL
    python benchmarks/second_model.py MODEL --recipes qoq4,kivi2 --no-learn --json -

MODEL is a folder; the committed results are of Gemma 3 270M (norms of queries and keys, five sliding-window layers to
each full one, one KV head), read from its Q4_K_M GGUF into float32. Each recipe is planned as ``kvq export --dry-run``
does, calibrated, learned where it learns, exported (with the check of its folds), and scored on one window of 256
tokens of kvq's own evaluation text. So short a window says that a recipe works, not how good it is.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path

import torch
from machine import machine

from kvq.cache import make_plan
from kvq.calib.artefacts import fit_artefacts
from kvq.calib.codebooks import books_of, learn_codebooks
from kvq.calib.collect import collect
from kvq.calib.data import builtin_text
from kvq.calib.learn import learn_fits, learned_steps
from kvq.calib.needs import DEFAULT_NEEDS, needs_of
from kvq.errors import KvqError
from kvq.eval.divergence import divergence
from kvq.eval.likelihood import score_windows
from kvq.eval.perplexity import cut_windows, perplexity
from kvq.exporting.exporter import export
from kvq.exporting.memory import memory_plan
from kvq.models.describe import describe
from kvq.models.resolve import load_config, load_model, load_tokenizer, resolve_model, weights_fingerprint
from kvq.recipe import list_recipes, load_recipe

RESULTS = Path(__file__).parent / "results" / "gemma3.json"
CALIBRATION, WINDOW = (4, 512), 256


def statistics(model, folder: Path, ids: list[int], recipes: list):
    """Statistics of a few windows with all that the recipes read, and what codebooks learn from."""
    spec = describe(model.config)
    count, length = CALIBRATION
    windows = torch.tensor(ids[: count * length]).view(count, length)
    needs = frozenset().union(DEFAULT_NEEDS, *(needs_of(recipe, spec) for recipe in recipes))
    stats = collect(model, windows, needs=needs, batch_size=1, weights_fingerprint=weights_fingerprint(folder))
    return learn_codebooks(model, recipes, stats, windows) if books_of(recipes, spec) else stats


def prepared(recipe, spec, stats, folder: Path, work: Path, learn: bool):
    """Statistics with what the recipe learns, the plan, what the export did, and seconds. Raises KvqError."""
    seconds = {}

    def timed(what: str, action):
        start = time.perf_counter()
        found = action()
        seconds[what] = round(time.perf_counter() - start, 2)
        return found

    memory_plan(spec, recipe)
    if learn and any(learned_steps(recipe, spec)):
        stats = timed("learn", lambda: learn_fits(recipe, spec, stats, folder, state_folder=work / "learned"))
    result = timed("export", lambda: export(folder, recipe, work / recipe.name, stats=stats))
    return make_plan(recipe, spec, fit_artefacts(recipe, spec, stats, folder)), result, seconds


def measure(arguments: argparse.Namespace) -> dict:
    folder = resolve_model(arguments.model)
    spec = describe(load_config(folder))
    tokenizer = load_tokenizer(folder)
    calibration, evaluation = (
        tokenizer(builtin_text(part)[:20000], verbose=False)["input_ids"] for part in ("calibration", "evaluation")
    )
    model = load_model(folder, dtype=torch.float32, device="cpu")
    recipes = [load_recipe(name) for name in arguments.recipes]
    usable, rows, plans = [], {}, {}
    for recipe in recipes:
        try:
            memory_plan(spec, recipe)
            usable.append(recipe)
        except KvqError as error:
            rows[recipe.name] = {"refused": str(error)}
    stats = statistics(model, folder, calibration, usable)
    for recipe in usable:
        with tempfile.TemporaryDirectory(dir=arguments.dir) as work:
            try:
                plan, result, seconds = prepared(recipe, spec, stats, folder, Path(work), arguments.learn)
            except KvqError as error:
                rows[recipe.name] = {"refused": str(error)}
                continue
        plans[recipe.name] = plan
        rows[recipe.name] = {
            "asymptotic_bits": plan.bits_per_element,
            "folds": list(result.folds),
            "check": result.check,
            "seconds": seconds,
        }
        print(recipe.name, rows[recipe.name]["seconds"], file=sys.stderr)
    for mode in ("stream", "simulate"):
        windows = cut_windows(evaluation, WINDOW, limit=1, mode=mode)
        (scores,) = score_windows(model, plans, windows, mode)
        for name, score in scores.items():
            text, distance = perplexity([score]), divergence([score])
            rows[name][mode] = {"perplexity": text.value, "kl": distance.kl, "top1": distance.top1}
            rows[name]["baseline"] = text.baseline
    kinds = [layer.kind for layer in spec.layers]
    return {
        "benchmark": "second_model",
        "model": arguments.name or folder.name,
        "model_type": spec.model_type,
        "layers": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        "window": WINDOW,
        "calibration_tokens": math.prod(CALIBRATION),
        "learned": arguments.learn,
        "recipes": {name: rows[name] for name in arguments.recipes},
        "machine": machine(),
    }


def joined(before: dict, now: dict) -> dict:
    """What was measured now, and rows of other recipes from a run on the same model and text."""
    if any(before[name] != now[name] for name in ("model", "layers", "window", "calibration_tokens")):
        return now
    rows = before["recipes"] | now["recipes"]
    return now | {"recipes": dict(sorted(rows.items()))}


def table(result: dict) -> str:
    layers = ", ".join(f"{count} {kind}" for kind, count in result["layers"].items())
    rows = result["recipes"]
    worked = [name for name, row in rows.items() if "refused" not in row]
    baseline = rows[worked[0]]["baseline"] if worked else math.nan
    lines = [
        f"{result['model']} (`{result['model_type']}`; layers: {layers}), float32: one window of {result['window']} "
        f"tokens of kvq's own evaluation text, after {result['calibration_tokens']:,} tokens of calibration. Exact "
        f"model: perplexity {baseline:.3f}. {len(worked)} recipes of {len(rows)} were exported and scored. `check` is "
        "the largest difference of a logit after folding, over the largest logit. So short a window says that a recipe "
        "works, not how good it is.",
        "",
        "| recipe | bits | KL stream | KL simulate | perplexity, simulate | transforms | check |",
        "| --- | ---: | ---: | ---: | ---: | --- | ---: |",
    ]
    for name, row in rows.items():
        if "refused" in row:
            lines.append(f"| {name} | | | | | refused: {row['refused'].replace('|', '/')} | |")
            continue
        check = f"{row['check']['error']:.0e}" if row["check"] else ""
        lines.append(
            f"| {name} | {row['asymptotic_bits']:.2f} | {row['stream']['kl']:.5f} | {row['simulate']['kl']:.5f} | "
            f"{row['simulate']['perplexity']:.3f} | {'; '.join(row['folds'])} | {check} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder")
    parser.add_argument("--name", help="what the table calls the model (default: the folder's name)")
    parser.add_argument("--recipes", type=lambda text: text.split(","), default=list_recipes(), metavar="NAME,...")
    parser.add_argument("--learn", action=argparse.BooleanOptionalAction, default=True, help="learn what recipes learn")
    parser.add_argument("--dir", help="where to write exports (default: the system's temporary folder)")
    parser.add_argument(
        "--json",
        default=str(RESULTS),
        help="file to write or to add to, beside its table; - for standard output",
    )
    arguments = parser.parse_args()
    result = measure(arguments)
    if arguments.json == "-":
        print(json.dumps(result, indent=2))
        return
    target = Path(arguments.json)
    if target.is_file():
        result = joined(json.loads(target.read_text()), result)
    target.write_text(json.dumps(result, indent=2) + "\n")
    target.with_suffix(".md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
