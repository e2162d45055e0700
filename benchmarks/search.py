"""The quality frontier: what 'kvq search' found, beside uniform recipes of its size, on unseen text.

    python benchmarks/search.py --data wikitext2_valid.txt --uniform --recipes FILE,...,klt4,klt3,klt2,klt2-light,kivi2
    python benchmarks/search.py --data wikitext2_valid.txt --spread seed1-2.5.yaml,seed2-2.5.yaml

Tokens, windows and calibration are those of ``quality.py``: tokens from 16,384 on, windows of 2,048, mode stream,
float32, statistics of the first 8,192 tokens unless --stats names others. A recipe found on another text keeps its
allocation; its transforms are fitted to the statistics given here. The best uniform recipe that a search found is
read from the evidence beside its recipe (--uniform). --journal keeps what is measured: an interrupted run goes on.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from importlib import resources
from pathlib import Path

import torch
from quality import CALIBRATION_TOKENS, FIRST_TOKEN, SEQ_LEN, wikitext_tokens
from rich.console import Console
from rich.progress import Progress

from kvq.cache import CachePlan
from kvq.calib.collect import collect
from kvq.calib.needs import needs_of
from kvq.calib.stats import Stats
from kvq.eval.perplexity import cut_windows
from kvq.eval.result import installed_versions
from kvq.models.describe import describe
from kvq.models.resolve import load_config, load_model, load_tokenizer, resolve_model
from kvq.recipe import Recipe, load_recipe, parse_recipe
from kvq.searching.journal import Journal, identity_hash
from kvq.searching.text_split import Part
from kvq.searching.verify import Verifier

RESULTS = Path(__file__).parent / "results"
FOUND = [str(path) for path in sorted(RESULTS.parents[1].glob("examples/auto/*.yaml"))]
# Asymptotic bits per element -> KL in nats that a recipe of that size should stay below.
GOALS = {4.5: 0.001, 3.25: 0.004, 2.5: 0.013, 2.0: 0.035}


def uniform_recipes(names: Iterable[str]) -> list[Recipe]:
    """The best uniform recipe that each of these recipes' searches measured, from the evidence beside it."""
    found = {}
    for name in names:
        path = Path(name).with_suffix("") if name.endswith(".yaml") else resources.files("kvq.recipes").joinpath(name)
        proof = Path(f"{path}.evidence.json")
        row = json.loads(proof.read_text())["best_uniform"] if proof.exists() else None
        if row:
            recipe = parse_recipe(row["recipe"], source=proof.name)
            found[recipe.hash] = recipe
    return list(found.values())


def measure(arguments: argparse.Namespace) -> dict:
    folder = resolve_model(arguments.model)
    model, spec = load_model(folder, dtype=torch.float32, device="cpu"), describe(load_config(folder))
    ids = wikitext_tokens(Path(arguments.data), load_tokenizer(folder))
    calibration = torch.tensor(ids[:CALIBRATION_TOKENS]).view(-1, SEQ_LEN)
    named = [load_recipe(name) for name in arguments.recipes]
    uniform = uniform_recipes(arguments.recipes) if arguments.uniform else []
    spread = [load_recipe(name) for name in arguments.spread]
    needs = frozenset().union(*(needs_of(recipe, spec) for recipe in (*named, *uniform, *spread)))
    stats = Stats.load(arguments.stats) if arguments.stats else collect(model, calibration, needs=needs)
    windows = cut_windows(ids[FIRST_TOKEN:], SEQ_LEN, limit=arguments.windows).tokens
    facts = {
        "schema_version": 1,
        "model": arguments.model,
        "mode": "stream",
        "data": {
            "file": Path(arguments.data).name,
            "sha256": hashlib.sha256(Path(arguments.data).read_bytes()).hexdigest(),
            "first_token": FIRST_TOKEN,
        },
        "stats": stats.data.to_dict() if stats.data else f"the first {CALIBRATION_TOKENS} tokens of the file",
        "seq_len": SEQ_LEN,
        "dtype": "float32",
        "versions": installed_versions(),
    }
    journal = Journal(Path(arguments.journal) if arguments.journal else None, identity_hash(facts))
    verifier = Verifier(model, spec, stats, folder, journal)
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("Measuring")
        found = verifier.measure(
            "frontier",
            [*named, *uniform, *spread],
            Part(windows=windows, starts=(0,) * len(windows)),
            lambda done, total: bar.update(task, completed=done, total=total),
        )
    journal.close()

    def row(recipe: Recipe, kind: str) -> dict:
        plan = verifier.plan(recipe)
        facts = {"name": recipe.name, "kind": kind, "recipe_hash": recipe.hash, "bits": plan.bits_per_element}
        return facts | {"where": where(plan)} | asdict(found[recipe.hash])

    rows = [row(r, "searched" if r.name.startswith("auto-") else "shipped") for r in named]
    rows += [row(r, "uniform, of the search's own space") for r in uniform]
    rows += [row(r, "searched on another text or seed") for r in spread]
    return {**facts, "windows": len(windows), "recipes": rows, "sizes": sizes(rows)}


def where(plan: CachePlan) -> dict:
    """Where the bits go: of keys and of values, over all layers and by layer."""
    by_layer: dict[str, list[float]] = {"key": [], "value": []}
    for groups in plan.layers.values():
        heads = sum(len(group.heads) for group in groups)
        for side, found in by_layer.items():
            parts = (len(g.heads) * g.layout.side(side).bits_per_element(len(g.heads), padded=True) for g in groups)
            found.append(round(sum(parts) / heads, 3))
    means = {side: round(sum(found) / len(found), 3) for side, found in by_layer.items()}
    return {"mean": means, "by_layer": by_layer}


def sizes(rows: list[dict]) -> list[dict]:
    """Goal, searched recipe and best uniform one at each size."""
    found = []
    for bits, goal in GOALS.items():
        searched = [r for r in rows if r["name"] == f"auto-{bits:g}"]
        uniform = [r for r in rows if not r["kind"].startswith("searched") and r["bits"] <= bits]
        best = min(uniform, key=lambda r: r["kl"], default=None)
        if searched and best:
            own = searched[0]
            found.append(
                {
                    "bits": bits,
                    "goal_kl": goal,
                    "kl": own["kl"],
                    "met": own["kl"] <= goal,
                    "best_uniform": best["name"],
                    "best_uniform_kl": best["kl"],
                    "ratio": own["kl"] / best["kl"],
                }
            )
    return found


def table(result: dict) -> str:
    lines = [
        f"SmolLM2-135M-Instruct, float32, mode `stream`, {result['windows']} windows of {result['seq_len']} tokens of "
        f"{result['data']['file']} from token {result['data']['first_token']:,}, to which nothing was fitted. Bits are "
        "asymptotic: codes and all metadata; besides, at most 128 recent tokens and 4 sinks are exact, for all.",
        "",
        "| size, bits | goal, KL | searched, KL | best uniform, KL | ratio | goal met |",
        "| ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in result["sizes"]:
        lines.append(
            f"| {row['bits']:g} | {row['goal_kl']:g} | {row['kl']:.5f} | {row['best_uniform_kl']:.5f} | "
            f"{row['ratio']:.2f} | {'yes' if row['met'] else 'no'} |"
        )
    lines += [
        "",
        "| recipe | kind | bits | of keys | of values | of the first layer's keys | KL (nats) | top-1 | delta NLL |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in sorted(result["recipes"], key=lambda row: -row["bits"]):
        error = "" if row["kl_stderr"] is None else f" ± {row['kl_stderr']:.5f}"
        loss = "" if row["delta_nll_stderr"] is None else f" ± {row['delta_nll_stderr']:.4f}"
        lines.append(
            f"| {row['name']} | {row['kind']} | {row['bits']:.3f} | {row['where']['mean']['key']:.2f} | "
            f"{row['where']['mean']['value']:.2f} | {row['where']['by_layer']['key'][0]:.2f} | "
            f"{row['kl']:.5f}{error} | {row['top1']:.4f} | "
            f"{row['delta_nll']:.4f}{loss} |"
        )
    return "\n".join(lines) + "\n"


def names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="FILE", help="WikiText-2 validation rows")
    parser.add_argument("--model", default="builtin", help="default: the embedded model")
    parser.add_argument("--recipes", type=names, default=FOUND, metavar="NAME|FILE,...")
    parser.add_argument("--spread", type=names, default=[], metavar="FILE,...", help="recipes of other searches")
    parser.add_argument("--uniform", action="store_true", help="also the best uniform recipe that each search found")
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--stats", metavar="FILE", help="statistics to use instead of calibrating here")
    parser.add_argument("--journal", metavar="FILE", help="where to keep what is measured")
    parser.add_argument("--json", metavar="FILE", help="default: results/search.json, beside its table search.md")
    arguments = parser.parse_args()
    result = measure(arguments)
    print(table(result), file=sys.stdout)
    target = Path(arguments.json) if arguments.json else RESULTS / "search.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    target.with_suffix(".md").write_text(table(result), encoding="utf-8")


if __name__ == "__main__":
    main()
