"""Every recipe of the codebook, outlier and low-rank families on the development span, in ``stream`` and ``simulate``.

    python benchmarks/codebooks.py --data wikitext2_valid.txt --work DIR

The protocol is that of ``quality.py``: WikiText-2 raw, validation split; its first 8,192 tokens calibrate (gradients
included), windows of 2,048 tokens from token 16,384 on are scored in float32. What one window gives is kept in --work,
so an interrupted run continues, and a run for more windows or recipes adds to it; --seconds ends a run early. Beside
the shipped recipes stand their ablations: without the exact first token (``-nosink``), without outliers (``-dense``),
and GEAR without its factors and outliers (``-backbone``). A row counts the windows that both it and its mode have.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from quality import CALIBRATION_TOKENS, FIRST_TOKEN, RESULTS, SEQ_LEN, row, wikitext_tokens
from safetensors.torch import load_file, save_file

from kvq.cache import CachePlan, make_plan
from kvq.calib.artefacts import fit_artefacts, stand_in_artefacts
from kvq.calib.codebooks import learn_codebooks
from kvq.calib.collect import collect
from kvq.calib.needs import needs_of
from kvq.calib.stats import Stats
from kvq.eval.likelihood import Windows, WindowScore, score_windows
from kvq.eval.measured_bits import measured_bits
from kvq.eval.perplexity import cut_windows
from kvq.eval.result import installed_versions
from kvq.models.describe import describe
from kvq.models.resolve import load_config, load_model, load_tokenizer, resolve_model
from kvq.recipe import Recipe, load_recipe, parse_recipe

KVQUANT = [f"kvquant{bits}{end}" for bits in (4, 3, 2) for end in ("", "-dense", "-nosink", "-dense-nosink")]
GEAR = ["gear4", "gear4-backbone", "gear2", "gear2-light", "gear2-backbone"]
OTHERS = ["turboquant4", "turboquant3", "turboquant2", "qjl", "skvq2", "flexgen4", "zeroquant8", "nf4", "fp8", "mxfp4"]
NAMES = [*KVQUANT, *GEAR, *OTHERS, "nvfp4", "kivi4", "kivi2"]
MODES = ("simulate", "stream")
LENGTHS = (2048, 32768)
# Recipes that share one forward of the exact model; what is done is kept after each.
TOGETHER = 4


def variant(name: str) -> Recipe:
    """A shipped recipe, or one of the ablations."""
    base = name.removesuffix("-nosink").removesuffix("-backbone")
    recipe = load_recipe(base)
    if name.endswith("-nosink"):
        recipe = recipe.override({"tokens.sinks": 0})
    if name.endswith("-backbone"):
        data = recipe.to_dict()
        for side in ("key", "value"):
            data[side] = {what: x for what, x in data[side].items() if what not in ("low_rank", "outliers")}
        recipe = parse_recipe(data, name)
    return dataclasses.replace(recipe, name=name)


def statistics(model, recipes: Mapping[str, Recipe], ids: list[int], work: Path) -> Stats:
    """What all the recipes read, measured once."""
    path = work / "stats.safetensors"
    if path.is_file():
        return Stats.load(path)
    tokens, spec = torch.tensor(ids[:CALIBRATION_TOKENS]).view(-1, SEQ_LEN), describe(model.config)
    needs = frozenset().union(*(needs_of(recipe, spec) for recipe in recipes.values()))
    stats = collect(model, tokens, needs=needs, strict=True, batch_size=1)
    stats = learn_codebooks(model, list(recipes.values()), stats, tokens, state_folder=work / "codebooks.partial")
    stats.save(path)
    return stats


def score(model, plans: Mapping[str, CachePlan], tokens: torch.Tensor, modes, work: Path, until: float) -> None:
    """Score what is missing, window by window, until ``until`` (seconds of ``time.monotonic``)."""
    for number in range(len(tokens)):
        for mode in modes:
            missing = [name for name in plans if not kept(work, mode, name, number).is_file()]
            for start in range(0, len(missing), TOGETHER):
                if time.monotonic() > until:
                    return
                names = missing[start : start + TOGETHER]
                window = Windows(tokens=tokens[number : number + 1], first=[1])
                began = time.monotonic()
                (found,) = score_windows(model, {name: plans[name] for name in names}, window, mode)
                for name, scores in found.items():
                    path = kept(work, mode, name, number)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    save_file({what: x.contiguous() for what, x in vars(scores).items()}, path)
                took = time.monotonic() - began
                print(f"window {number} {mode}: {', '.join(names)} in {took:.0f} s", file=sys.stderr, flush=True)


def run(arguments, everything: Mapping[str, Recipe], spec) -> None:
    """Measure what the recipes read, and score what is missing."""
    until = time.monotonic() + arguments.seconds
    folder = resolve_model(arguments.model)
    model = load_model(folder, dtype=torch.float32, device="cpu")
    ids = wikitext_tokens(arguments.data, load_tokenizer(folder))
    stats = statistics(model, everything, ids, arguments.work)
    chosen = {name: everything[name] for name in arguments.recipes}
    plans = {name: make_plan(recipe, spec, fit_artefacts(recipe, spec, stats)) for name, recipe in chosen.items()}
    windows = cut_windows(ids[FIRST_TOKEN:], SEQ_LEN, limit=arguments.windows, mode="stream")
    score(model, plans, windows.tokens, arguments.modes, arguments.work, until)


def kept(work: Path, mode: str, name: str, window: int) -> Path:
    return work / mode / f"{name}.{window}.safetensors"


def result(arguments, plans: Mapping[str, CachePlan], spec) -> dict:
    rows: dict[str, dict] = {}
    for name, plan in plans.items():
        at = {f"bits_at_{length}": measured_bits(plan, length, spec.dtype) for length in LENGTHS}
        rows[name] = {"asymptotic_bits": plan.bits_per_element, **at, "recipe_hash": plan.recipe.hash}
        for mode in MODES:
            paths = [kept(arguments.work, mode, name, number) for number in range(arguments.windows)]
            scores = [WindowScore(**load_file(path)) for path in paths if path.is_file()]
            if scores:
                found = row(plan, scores, spec)
                drop = ("recipe_hash", "bits_per_element", "asymptotic_bits")
                rows[name][mode] = {"windows": len(scores)} | {k: v for k, v in found.items() if k not in drop}
    return {
        "schema_version": 1,
        "model": arguments.model,
        "data": {
            "file": arguments.data.name,
            "first_token": FIRST_TOKEN,
            "calibration_tokens": CALIBRATION_TOKENS,
        },
        "seq_len": SEQ_LEN,
        "dtype": "float32",
        "cache_dtype": str(spec.dtype).removeprefix("torch."),
        "versions": installed_versions(),
        "recipes": rows,
    }


def table(found: dict) -> str:
    lines = [
        f"SmolLM2-135M-Instruct, float32, windows of {found['seq_len']:,} tokens of {found['data']['file']} from token "
        f"{found['data']['first_token']:,}; the number of windows is in brackets. Bits an element: asymptotic, and "
        "measured on a cache filled with 2,048 and 32,768 tokens. The rise of perplexity is over the exact model on "
        "the same windows.",
        "",
        "| recipe | bits | 2K | 32K | "
        + " | ".join(f"{mode}: perplexity | rise | KL | top-1" for mode in MODES)
        + " |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, own in found["recipes"].items():
        cells = [f"{own['asymptotic_bits']:.2f}", *(f"{own[f'bits_at_{length}']:.2f}" for length in LENGTHS)]
        for mode in MODES:
            if mode not in own:
                cells += ["", "", "", ""]
                continue
            at = own[mode]
            rise = 100 * (at["perplexity"] / at["baseline"] - 1)
            cells += [
                f"{at['perplexity']:.3f} ({at['windows']})",
                f"{rise:+.1f}%",
                f"{at['kl']:.4f}",
                f"{at['top1']:.3f}",
            ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, metavar="FILE", help="WikiText-2 validation rows")
    parser.add_argument("--work", required=True, type=Path, metavar="DIR", help="what a later run continues from")
    parser.add_argument("--model", default="builtin", help="default: the embedded model")
    parser.add_argument("--recipes", type=lambda text: text.split(","), default=NAMES, metavar="NAME,...")
    parser.add_argument("--modes", type=lambda text: text.split(","), default=list(MODES), metavar="MODE,...")
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="begin nothing new after it; 0: report only"
    )
    parser.add_argument("--write", action="store_true", help="write results/codebooks.json and its table")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    spec = describe(load_config(resolve_model(arguments.model)))
    everything = {name: variant(name) for name in dict.fromkeys([*NAMES, *arguments.recipes])}
    if arguments.seconds > 0:
        run(arguments, everything, spec)
    # Bits do not depend on what calibration found.
    plans = {name: make_plan(recipe, spec, stand_in_artefacts(recipe, spec)) for name, recipe in everything.items()}
    found = result(arguments, plans, spec)
    print(table(found))
    if arguments.write:
        (RESULTS / "codebooks.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        (RESULTS / "codebooks.md").write_text(table(found), encoding="utf-8")


if __name__ == "__main__":
    main()
