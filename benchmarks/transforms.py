"""Quality of transforms at 4, 3 and 2 bits: what each takes away of a per-token codec's loss, at the same bits.

    python benchmarks/transforms.py --data wikitext2_valid.txt
    python benchmarks/transforms.py --data wikitext2_valid.txt --recipes int4,qoq4:tokens.sinks=4 --windows 1 --json -

Data, windows and mode are those of benchmarks/quality.py. One calibration serves all recipes: its statistics and what
learned transforms learn are kept in --work and used again, and so are the scores of every window: an interrupted run
goes on where it was. Files are named by a recipe's hash alone, so take another --work when kvq itself has changed.
"""

import argparse
import json
import resource
import sys
import time
from dataclasses import fields
from pathlib import Path

import torch
import yaml
from quality import CALIBRATION_TOKENS, FIRST_TOKEN, SEQ_LEN, row, wikitext_tokens
from safetensors.torch import load_file, save_file

from kvq.cache import CachePlan, make_plan
from kvq.cache.plan import check_transforms
from kvq.calib.artefacts import fit_artefacts, needed_artefacts
from kvq.calib.collect import collect
from kvq.calib.learn import fit_name, learn_fits, learned_steps
from kvq.calib.needs import needs_of
from kvq.calib.stats import Stats
from kvq.errors import UnsupportedModelError
from kvq.eval.likelihood import Windows, WindowScore, score_windows
from kvq.eval.perplexity import cut_windows
from kvq.eval.result import installed_versions
from kvq.exporting.folding import fold_lines, plan_of_folds
from kvq.models.describe import describe
from kvq.models.resolve import load_config, load_model, load_tokenizer, resolve_model, weights_fingerprint
from kvq.recipe import Recipe, list_recipes, load_recipe

RESULTS = Path(__file__).parent / "results"
RESERVOIR_BYTES = 1 << 30
# Recipes that are measured beside those with transforms, for comparison.
INTEGERS = ("int4", "int3", "int2")
PLAIN = (*INTEGERS, "kivi4", "kivi2", "sinks4")
# Recipes that share one forward of the exact model.
TOGETHER = 4


def default_recipes(spec) -> list[str]:
    """Recipes with transforms that fit the model, and those for comparison."""
    return [name for name in list_recipes() if name in PLAIN or is_transformed(load_recipe(name), spec)]


def load_variant(text: str) -> Recipe:
    """``NAME``, or ``NAME:KEY=VALUE`` for a recipe with a setting changed."""
    name, *settings = text.split(":")
    changes = {key: yaml.safe_load(value) for key, value in (setting.split("=", 1) for setting in settings)}
    return load_recipe(name).override(changes) if changes else load_recipe(name)


def is_transformed(recipe: Recipe, spec) -> bool:
    try:
        check_transforms(recipe, spec)
    except UnsupportedModelError as error:
        print(f"{recipe.name}: {error}", file=sys.stderr)
        return False
    return bool(recipe.transforms.to_dict())


def statistics(folder: Path, model, ids: list[int], recipes: dict[str, Recipe], work: Path) -> tuple[Stats, dict]:
    """Statistics with all fits that the recipes need, and the seconds that learning took."""
    spec, path, times = describe(model.config), work / "stats.safetensors", work / "seconds.json"
    # Those of all recipes, so that every selection of them is calibrated alike.
    every = [*recipes.values(), *map(load_recipe, default_recipes(spec))]
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


def plan_of(recipe: Recipe, spec, stats: Stats, folder: Path, work: Path) -> CachePlan:
    """The recipe's plan, with artefacts that are fitted once."""
    kept = work / f"artefacts-{recipe.hash[:16]}.safetensors"
    if needed_artefacts(recipe, spec) and not kept.is_file():
        artefacts = fit_artefacts(recipe, spec, stats, folder)
        save_file({what: tensor.clone() for what, tensor in artefacts.items()}, kept)
    return make_plan(recipe, spec, load_file(kept) if kept.is_file() else {})


def scores_file(plan: CachePlan, mode: str, number: int, work: Path) -> Path:
    return work / f"scores-{plan.recipe.hash[:16]}-{mode}-{number}.safetensors"


def score(plans: dict[str, CachePlan], model, windows: Windows, mode: str, work: Path) -> None:
    """Score every window under every plan, and keep each in a file of its own."""
    for number in range(len(windows.tokens)):
        missing = {name: plan for name, plan in plans.items() if not scores_file(plan, mode, number, work).is_file()}
        if not missing:
            continue
        one = Windows(tokens=windows.tokens[number : number + 1], first=windows.first[number : number + 1])
        (found,) = score_windows(model, missing, one, mode)
        for name, scored in found.items():
            tensors = {field.name: getattr(scored, field.name).contiguous() for field in fields(scored)}
            save_file(tensors, scores_file(plans[name], mode, number, work))
            print(f"window {number}  {name:16} KL {float(scored.kl.mean()):.5f}", file=sys.stderr, flush=True)


def finished_row(recipe: Recipe, plan: CachePlan, windows: Windows, mode: str, folder: Path, work: Path) -> dict:
    """A recipe's row, which outlives its plan, so that a table is made without fitting anything again."""
    kept = row_file(recipe, mode, len(windows.tokens), work)
    scores = [load_file(scores_file(plan, mode, number, work)) for number in range(len(windows.tokens))]
    found = row(plan, [WindowScore(**tensors) for tensors in scores], plan.model)
    kept.write_text(json.dumps(found | {"folds": list(fold_lines(plan, plan_of_folds(plan, folder)))}))
    return json.loads(kept.read_text())


def row_file(recipe: Recipe, mode: str, windows: int, work: Path) -> Path:
    return work / f"row-{recipe.hash[:16]}-{mode}-{windows}.json"


def measure(arguments: argparse.Namespace) -> dict:
    folder, work = resolve_model(arguments.model), Path(arguments.work)
    work.mkdir(parents=True, exist_ok=True)
    model = load_model(folder, dtype=torch.float32, device="cpu")
    spec = describe(load_config(folder))
    ids = wikitext_tokens(Path(arguments.data), load_tokenizer(folder))
    recipes = {name: load_variant(name) for name in arguments.recipes or default_recipes(spec)}
    stats, seconds = statistics(folder, model, ids, recipes, work)
    windows = cut_windows(ids[FIRST_TOKEN:], SEQ_LEN, limit=arguments.windows, mode=arguments.mode)
    mode, count = arguments.mode, len(windows.tokens)
    pending = [name for name, recipe in recipes.items() if not row_file(recipe, mode, count, work).is_file()]
    for start in range(0, len(pending), TOGETHER):
        names = pending[start : start + TOGETHER]
        plans = {name: plan_of(recipes[name], spec, stats, folder, work) for name in names}
        score(plans, model, windows, mode, work)
        for name in names:
            found = finished_row(recipes[name], plans[name], windows, mode, folder, work)
            print(f"{name:16} KL {found['kl']:.5f}  bits {found['asymptotic_bits']:.3f}", file=sys.stderr, flush=True)
    rows = {}
    for name, recipe in recipes.items():
        rows[name] = json.loads(row_file(recipe, mode, count, work).read_text()) | {"summary": recipe.summary}
        rows[name] |= {"learned": curve(recipe, stats, spec), "learning_seconds": seconds.get(name)}
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
        "model runs; 'of plain' is the KL over that of plain integers at the same bits.",
        "",
        "| recipe | bits | KL (nats) | of plain | perplexity | top-1 | in weights | while it runs |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    plain = {round(row["asymptotic_bits"], 6): row["kl"] for name, row in result["recipes"].items() if name in INTEGERS}
    for name, found in sorted(result["recipes"].items(), key=lambda item: (-item[1]["asymptotic_bits"], item[1]["kl"])):
        folded, online = places(found["folds"])
        same = plain.get(round(found["asymptotic_bits"], 6))
        share = f"{found['kl'] / same:.2f}" if same else "-"
        lines.append(
            f"| {name} | {found['asymptotic_bits']:.2f} | {found['kl']:.5f} | {share} | {found['perplexity']:.3f} | "
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
    parser.add_argument("--work", default="transforms-work", metavar="DIR", help="statistics, fits and scores")
    parser.add_argument("--json", metavar="FILE|-", help="default: results/transforms.json, beside its table")
    arguments = parser.parse_args()
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
