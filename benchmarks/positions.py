"""Loss by position: one long window of a book, with statistics of other text, at the model's full context.

    python benchmarks/positions.py --data wikitext2_valid.txt --book book_moby_dick.txt --recipes klt4,klt2,int4,kivi2

Every recipe is scored in mode ``stream``, with statistics (a) of the first 8,192 tokens of --data, as the table of
recipes has them, and (b) of what ``kvq calibrate builtin`` reads, as users have them; once, if it needs none. The
window has 8,192 tokens of the book, from token 16,384 on. A recipe that does not depend on positions keeps its loss but
for the text: the last column is KL over positions 4,096 to 8,191 divided by KL over 256 to 511.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from quality import CALIBRATION_TOKENS, FIRST_TOKEN, RESULTS, SEQ_LEN, wikitext_tokens

import kvq
from kvq.cache import make_plan
from kvq.calib.artefacts import fit_artefacts, needed_artefacts
from kvq.calib.collect import collect
from kvq.calib.needs import needs_of
from kvq.eval.likelihood import score_windows
from kvq.eval.perplexity import cut_windows
from kvq.eval.result import installed_versions
from kvq.models.describe import describe
from kvq.models.resolve import load_config, load_model, load_tokenizer, resolve_model
from kvq.recipe import load_recipe

LENGTH = 8192
BUCKETS = ((128, 256), (256, 512), (512, 1024), (1024, 2048), (2048, 4096), (4096, 8192))
STATISTICS = ("development", "builtin")


def measure(arguments: argparse.Namespace) -> dict:
    folder = resolve_model("builtin")
    model = load_model(folder, dtype=torch.float32, device="cpu")
    tokenizer, spec = load_tokenizer(folder), describe(load_config(folder))
    recipes = {recipe.name: recipe for recipe in map(load_recipe, arguments.recipes)}
    development = wikitext_tokens(Path(arguments.data), tokenizer)[:CALIBRATION_TOKENS]
    needs = frozenset().union(*(needs_of(recipe, spec) for recipe in recipes.values()))
    stats = {
        "development": collect(model, torch.tensor(development).view(-1, SEQ_LEN), needs=needs, batch_size=1),
        "builtin": kvq.calibrate(model, tokenizer=tokenizer, recipe=list(recipes.values())),
    }
    plans = {
        (name, given): make_plan(recipe, spec, fit_artefacts(recipe, spec, stats[given], folder))
        for name, recipe in recipes.items()
        for given in STATISTICS
    }
    ids = tokenizer(Path(arguments.book).read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)
    windows = cut_windows(ids["input_ids"][FIRST_TOKEN:], LENGTH, limit=1, mode="stream")
    start = time.perf_counter()
    # One at a time: their numbers beside each other would take the machine's memory.
    found = {}
    for key, plan in plans.items():
        other = key[0], STATISTICS[0]
        if other in found and not needed_artefacts(plan.recipe, spec):
            found[key] = found[other]
            continue
        (scores,) = score_windows(model, {key: plan}, windows, "stream")
        kl = scores[key].kl.double()
        found[key] = [float(kl[low - 1 : high - 1].mean()) for low, high in BUCKETS]
        print(*key, [round(part, 4) for part in found[key]], f"{time.perf_counter() - start:.0f} s", flush=True)
    return {
        "schema_version": 1,
        "book": Path(arguments.book).name,
        "first_token": FIRST_TOKEN,
        "tokens": LENGTH,
        "mode": "stream",
        "dtype": "float32",
        "buckets": BUCKETS,
        "versions": installed_versions(),
        "recipes": {
            name: {"hash": recipe.hash, "asymptotic_bits": plans[name, STATISTICS[0]].bits_per_element}
            | {given: found[name, given] for given in STATISTICS}
            for name, recipe in recipes.items()
        },
    }


def table(result: dict) -> str:
    lines = [
        f"KL in nats by position, SmolLM2-135M-Instruct, float32, mode `stream`, one window of {LENGTH:,} tokens of "
        f"{result['book']}. (a): statistics of the first {CALIBRATION_TOKENS:,} development tokens; (b): of the "
        "embedded text.",
        "",
        "| recipe | bits | statistics | " + " | ".join(f"{low:,}-{high - 1:,}" for low, high in BUCKETS) + " | ratio |",
        "| --- | ---: | --- | " + " | ".join(["---:"] * len(BUCKETS)) + " | ---: |",
    ]
    for name, row in result["recipes"].items():
        for letter, given in zip("ab", STATISTICS):
            kl = row[given]
            numbers = " | ".join(f"{part:.4f}" for part in kl)
            lines.append(f"| {name} | {row['asymptotic_bits']:.2f} | {letter} | {numbers} | {kl[-1] / kl[1]:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="FILE", help="WikiText-2 validation rows")
    parser.add_argument("--book", required=True, metavar="FILE", help="plain text")
    parser.add_argument("--recipes", type=lambda text: text.split(","), required=True, metavar="NAME|FILE,...")
    arguments = parser.parse_args()
    result = measure(arguments)
    sys.stdout.write(table(result))
    (RESULTS / "positions.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "positions.md").write_text(table(result), encoding="utf-8")


if __name__ == "__main__":
    main()
