"""Quality of transforms at 4, 3 and 2 bits: what each takes away of a per-token codec's loss, at the same bits.

    python benchmarks/transforms.py --data wikitext2_valid.txt
    python benchmarks/transforms.py --data wikitext2_valid.txt --recipes int4,qoq4 --windows 1 --json -

Data, windows and mode are those of benchmarks/quality.py. One calibration serves all recipes: its statistics and what
learned transforms learn are kept in --work and used again, and so is every finished row of the table.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from quality import CALIBRATION_TOKENS, FIRST_TOKEN, SEQ_LEN, row, wikitext_tokens

from kvq.cache import make_plan
from kvq.calib.artefacts import fit_artefacts, needed_artefacts
from kvq.calib.collect import collect
from kvq.calib.learn import fit_name, learn_fits, learned_steps
from kvq.calib.needs import needs_of
from kvq.calib.stats import Stats
from kvq.eval.likelihood import score_windows
from kvq.eval.perplexity import cut_windows
from kvq.eval.result import installed_versions
from kvq.export.folding import fold_lines, plan_of_folds
from kvq.models.describe import describe
from kvq.models.resolve import load_config, load_model, load_tokenizer, resolve_model, weights_fingerprint
from kvq.recipe import Recipe, list_recipes, load_recipe

RESULTS = Path(__file__).parent / "results"
RESERVOIR_BYTES = 1 << 30
# Recipes that are measured beside those with transforms, for comparison.
PLAIN = ("int4", "int3", "int2", "kivi4", "kivi2", "sinks4")
# Recipes that share one forward of the exact model.
TOGETHER = 4


def default_recipes() -> list[str]:
    return [name for name in list_recipes() if load_recipe(name).transforms.to_dict() or name in PLAIN]


def statistics(folder: Path, model, ids: list[int], recipes: dict[str, Recipe], work: Path) -> tuple[Stats, dict]:
    """Statistics with all fits that the recipes need, and the seconds that learning took."""
    spec, path, times = describe(model.config), work / "stats.safetensors", work / "seconds.json"
    # Those of all recipes, so that every selection of them is calibrated alike.
    every = [*recipes.values(), *map(load_recipe, default_recipes())]
    needs = frozenset().union(*(needs_of(recipe, spec) for recipe in every))
    stats = Stats.load(path) if path.is_file() else None
    if stats is None or not needs <= stats.needs:
        windows = torch.tensor(ids[:CALIBRATION_TOKENS]).view(-1, SEQ_LEN)
        settings = {"batch_size": 1, "reservoir_bytes": RESERVOIR_BYTES}
        stats = collect(model, windows, needs=needs, weights_fingerprint=weights_fingerprint(folder), **settings)
        stats.save(path)
    seconds = json.loads(times.read_text()) if times.is_file() else {}
    for name, recipe in recipes.items():
        if not any(learned_steps(recipe, spec)):
            continue
        start, before = time.perf_counter(), time.process_time()
        learned = learn_fits(recipe, spec, stats, folder, state_folder=work / "learned")
        if name not in seconds:
            seconds[name] = {
                "wall": round(time.perf_counter() - start, 1),
                "cpu": round(time.process_time() - before, 1),
                "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
            }
            times.write_text(json.dumps(seconds))
        stats = learned
        print(f"learned {name}: {seconds[name]}", file=sys.stderr)
    return stats, seconds


def curve(recipe: Recipe, stats: Stats, spec) -> dict[str, dict[str, float]] | None:
    """Mean over layers of the error on windows that were not trained on, by side: before and after learning."""
    found: dict[str, list[tuple[float, float]]] = {}
    for layer, side, head, place in learned_steps(recipe, spec):
        trials = stats.fits[fit_name(head, side, place)].facts["layers"][str(layer.index)]["trials"]
        found.setdefault(side, []).append((trials[0][1], min(error for _, error in trials)))
    return {
        side: {"before": sum(a for a, _ in pairs) / len(pairs), "after": sum(b for _, b in pairs) / len(pairs)}
        for side, pairs in found.items()
    } or None


def score(recipes, model, spec, stats: Stats, folder: Path, windows, mode: str) -> Iterator[tuple[str, dict]]:
    """Rows of some recipes, scored on one forward of the exact model."""
    plans = {}
    for name, recipe in recipes.items():
        artefacts = fit_artefacts(recipe, spec, stats, folder) if needed_artefacts(recipe, spec) else {}
        plans[name] = make_plan(recipe, spec, artefacts)
    found = list(score_windows(model, plans, windows, mode))
    for name, plan in plans.items():
        folds = list(fold_lines(plan, plan_of_folds(plan, folder)))
        yield name, row(plan, [window[name] for window in found], spec) | {"folds": folds}


def measure(arguments: argparse.Namespace) -> dict:
    folder, work = resolve_model(arguments.model), Path(arguments.work)
    work.mkdir(parents=True, exist_ok=True)
    model = load_model(folder, dtype=torch.float32, device="cpu")
    spec = describe(load_config(folder))
    ids = wikitext_tokens(Path(arguments.data), load_tokenizer(folder))
    recipes = {name: load_recipe(name) for name in arguments.recipes}
    stats, seconds = statistics(folder, model, ids, recipes, work)
    windows = cut_windows(ids[FIRST_TOKEN:], SEQ_LEN, limit=arguments.windows, mode=arguments.mode)
    kept = {
        name: work / f"row-{recipe.hash[:16]}-{arguments.mode}-{arguments.windows}.json"
        for name, recipe in recipes.items()
    }
    pending = [name for name in recipes if not kept[name].is_file()]
    for start in range(0, len(pending), TOGETHER):
        names = pending[start : start + TOGETHER]
        for name, found in score(
            {name: recipes[name] for name in names}, model, spec, stats, folder, windows, arguments.mode
        ):
            kept[name].write_text(json.dumps(found))
            print(f"{name:16} KL {found['kl']:.5f}  bits {found['asymptotic_bits']:.3f}", file=sys.stderr)
    rows = {}
    for name, recipe in recipes.items():
        rows[name] = json.loads(kept[name].read_text()) | {"summary": recipe.summary}
        rows[name]["learned"] = curve(recipe, stats, spec)
        rows[name]["learning_seconds"] = seconds.get(name)
    return {
        "benchmark": "transforms",
        "model": arguments.model,
        "mode": arguments.mode,
        "windows": arguments.windows,
        "seq_len": SEQ_LEN,
        "first_token": FIRST_TOKEN,
        "calibration_tokens": CALIBRATION_TOKENS,
        "versions": installed_versions(),
        "recipes": rows,
    }


def table(result: dict) -> str:
    """Markdown, by falling bits and then by KL."""
    lines = [
        f"SmolLM2-135M-Instruct, float32, mode `{result['mode']}`, {result['windows']} windows of {result['seq_len']} "
        f"tokens of WikiText-2 (validation) from token {result['first_token']:,}; calibrated on the first "
        f"{result['calibration_tokens']:,}. Bits: codes and metadata. 'In weights' names what costs nothing while the "
        "model runs.",
        "",
        "| recipe | bits | KL (nats) | perplexity | top-1 | in weights | while it runs |",
        "| --- | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    for name, found in sorted(result["recipes"].items(), key=lambda item: (-item[1]["asymptotic_bits"], item[1]["kl"])):
        folded, online = places(found["folds"])
        lines.append(
            f"| {name} | {found['asymptotic_bits']:.2f} | {found['kl']:.5f} | {found['perplexity']:.3f} | "
            f"{found['top1']:.4f} | {folded} | {online} |"
        )
    return "\n".join(lines) + "\n"


def places(folds: list[str]) -> tuple[str, str]:
    """Transforms in the weights, and those that are applied while the model runs, of all sides."""
    weights, online = [], []
    for line in folds:
        side, what = line.split("s of ", 1)[0], line.split(": ", 1)[1]
        for part in what.split("; "):
            kinds = part.split(" in the weights")[0].split(" while the model")[0]
            (weights if "in the weights" in part else online).append(f"{side} {kinds}")
    return "; ".join(dict.fromkeys(weights)) or "-", "; ".join(dict.fromkeys(online)) or "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="FILE", help="WikiText-2 validation rows")
    parser.add_argument("--model", default="builtin", help="default: the embedded model")
    parser.add_argument("--recipes", type=lambda text: text.split(","), metavar="NAME,...", help="default: all")
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--mode", choices=("stream", "simulate"), default="stream")
    parser.add_argument("--work", default="transforms-work", metavar="DIR", help="statistics, fits and finished rows")
    parser.add_argument("--json", metavar="FILE|-", help="default: results/transforms.json, beside its table")
    arguments = parser.parse_args()
    arguments.recipes = arguments.recipes or default_recipes()
    result = measure(arguments)
    print(table(result), file=sys.stderr if arguments.json == "-" else sys.stdout)
    text = json.dumps(result, indent=2) + "\n"
    if arguments.json == "-":
        print(text, end="")
        return
    target = Path(arguments.json) if arguments.json else RESULTS / "transforms.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(text, encoding="utf-8")
    target.with_suffix(".md").write_text(table(result), encoding="utf-8")


if __name__ == "__main__":
    main()
