"""What learning transforms on the logits of the whole model costs, and what it adds to learning layer by layer.

    python benchmarks/end_to_end.py --data wikitext2_valid.txt --work DIR

Runs ``kvq calibrate MODEL --for RECIPE --end-to-end``, which learns both ways in turn on kvq's own text (the bar
for all of it is 20 minutes on two cores), and scores both beside the same recipe with a random rotation: windows,
tokens and mode are those of quality.py. DIR keeps the statistics: an interrupted run goes on.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from machine import machine
from quality import FIRST_TOKEN, SEQ_LEN, wikitext_tokens
from rich.console import Console
from rich.progress import track

from kvq.cache import make_plan
from kvq.calib.artefacts import fit_artefacts
from kvq.calib.end_to_end import OBJECTIVE
from kvq.calib.stats import Stats
from kvq.eval.divergence import divergence
from kvq.eval.likelihood import score_windows
from kvq.eval.perplexity import cut_windows, perplexity
from kvq.models.describe import describe
from kvq.models.resolve import load_config, load_model, load_tokenizer, resolve_model
from kvq.recipe import load_recipe

RESULTS = Path(__file__).parent / "results" / "end_to_end.json"
BAR_SECONDS = 1200.0


def calibrate(model: str, recipe: str, work: Path) -> dict:
    """What the command says of its learning; its statistics are in ``work``."""
    found = work / "calibrate.json"
    if not found.exists():
        command = [sys.executable, "-m", "kvq.cli", "calibrate", model, "--for", recipe, "--end-to-end"]
        start = time.perf_counter()
        subprocess.run([*command, "-o", work / "stats.safetensors", "--json", work / "command.json"], check=True)
        seconds = time.perf_counter() - start
        facts = {"seconds": seconds, "learning": json.loads((work / "command.json").read_text())["learning"]}
        found.write_text(json.dumps(facts), encoding="utf-8")
    return json.loads(found.read_text())


def measure(arguments: argparse.Namespace) -> dict:
    work = Path(arguments.work)
    work.mkdir(parents=True, exist_ok=True)
    learned = calibrate(arguments.model, arguments.recipe, work)
    folder = resolve_model(arguments.model)
    model, spec = load_model(folder, dtype=torch.float32, device="cpu"), describe(load_config(folder))
    stats = Stats.load(work / "stats.safetensors")
    together = {name: fit for name, fit in stats.fits.items() if fit.facts.get("objective") == OBJECTIVE}
    alone = replace(stats, fits={name: fit for name, fit in stats.fits.items() if name not in together})
    recipe, random = load_recipe(arguments.recipe), load_recipe(arguments.random)
    plans = {
        "random": make_plan(random, spec, fit_artefacts(random, spec, stats, folder)),
        "layer by layer": make_plan(recipe, spec, fit_artefacts(recipe, spec, alone, folder)),
        "end to end": make_plan(recipe, spec, fit_artefacts(recipe, spec, stats, folder)),
    }
    ids = wikitext_tokens(Path(arguments.data), load_tokenizer(folder))
    windows = cut_windows(ids[FIRST_TOKEN:], SEQ_LEN, limit=arguments.windows, mode="stream")
    scores = {name: [] for name in plans}
    for window in track(
        score_windows(model, plans, windows, "stream"), total=arguments.windows, console=Console(stderr=True)
    ):
        for name, score in window.items():
            scores[name].append(score)
    return {
        "benchmark": "end_to_end",
        "model": arguments.model,
        "recipe": arguments.recipe,
        "random": arguments.random,
        "bar_seconds": BAR_SECONDS,
        **learned,
        "met": learned["seconds"] < BAR_SECONDS,
        "losses": {fit.facts["recipe"]: fit.facts["losses"] for fit in together.values()},
        "windows": arguments.windows,
        "quality": {name: quality(own) for name, own in scores.items()},
        "machine": machine(),
    }


def quality(scores: list) -> dict:
    text, distance = perplexity(scores), divergence(scores)
    return {
        "perplexity": round(text.value, 4),
        "kl": round(distance.kl, 5),
        "kl_stderr": None if distance.kl_stderr is None else round(distance.kl_stderr, 5),
        "top1": round(distance.top1, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="FILE", help="WikiText-2 validation rows")
    parser.add_argument("--work", required=True, metavar="DIR", help="where statistics are kept")
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--recipe", default="spinquant3")
    parser.add_argument("--random", default="quarot3", help="the same recipe with a random rotation")
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--json", default=str(RESULTS), help="file for the result")
    arguments = parser.parse_args()
    found = measure(arguments)
    Path(arguments.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: found[name] for name in ("seconds", "met", "learning", "quality")}, indent=1))


if __name__ == "__main__":
    main()
