"""Does the diagnosis foresee what recipes do? Predicted against measured loss, on a real model and on made ones.

    python benchmarks/diagnosis.py --data wikitext2_valid.txt
    python benchmarks/diagnosis.py --data wikitext2_valid.txt --cases smollm2,few_layers --json -

Every case is a model: SmolLM2-135M-Instruct as it is; the same with a large key bias and with massive activations that
reach its keys; and a model made by hand whose recall passes through one full-attention layer, or through twelve
(``made_models.py``). Each is calibrated on one text, diagnosed from the statistics alone, and then quantized and
measured on another text: KL divergence from the exact model in nats per token, mode stream. Predictions are made twice,
with what plain ``kvq calibrate`` measures and with ``--full``.

A case that is in the results file already is kept, unless --cases names it.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from machine import machine
from made_models import (
    recall_model,
    recall_text,
    recall_tokenizer,
    with_large_key_bias,
    with_massive_keys,
)

from kvq.calib.collect import collect
from kvq.calib.diagnosis import CANDIDATES, diagnose, layers_of
from kvq.calib.diagnosis.predict import COLLAPSE, GOOD, plan_of
from kvq.calib.needs import ALL_NEEDS, DEFAULT_NEEDS
from kvq.errors import KvqError
from kvq.eval.likelihood import Windows, score_windows
from kvq.models.resolve import load_model, load_tokenizer, resolve_model
from kvq.recipe import load_recipe

RESULTS = Path(__file__).parent / "results" / "diagnosis.json"
RECIPES = (*CANDIDATES, "int3")
# The channel in which SmolLM2's first token has its massive activation, and how large its keys are made.
MASSIVE_CHANNEL, MASSIVE_SIZE = 325, 400.0
CALIBRATION, MEASURED, SEQ_LEN = 8, 2, 1024


def smollm2(arguments):
    folder = resolve_model("builtin")
    model = load_model(folder, dtype=torch.float32, device="cpu")
    text = Path(arguments.data).read_text(encoding="utf-8")
    ids = torch.tensor(load_tokenizer(folder)(text, verbose=False)["input_ids"])
    windows = ids[: (CALIBRATION + MEASURED) * SEQ_LEN].view(-1, SEQ_LEN)
    return model, windows[:CALIBRATION], windows[CALIBRATION:], 1


def key_bias(arguments):
    model, *rest = smollm2(arguments)
    return with_large_key_bias(model), *rest


def massive(arguments):
    model, *rest = smollm2(arguments)
    return with_massive_keys(model, MASSIVE_CHANNEL, MASSIVE_SIZE), *rest


def recall(full_layers: int):
    ids = torch.tensor(recall_tokenizer()(recall_text(CALIBRATION + MEASURED))["input_ids"])
    windows = ids.view(CALIBRATION + MEASURED, -1)
    # What was said once cannot be recalled before it is said again.
    return recall_model(full_layers), windows[:CALIBRATION], windows[CALIBRATION:], windows.shape[1] // 2 + 1


CASES = {
    "smollm2": smollm2,
    "key_bias": key_bias,
    "massive": massive,
    "few_layers": lambda arguments: recall(1),
    "many_layers": lambda arguments: recall(12),
}


def examine(name: str, arguments: argparse.Namespace) -> dict:
    model, calibration, held_out, first = CASES[name](arguments)
    recipes = [load_recipe(recipe) for recipe in arguments.recipes]
    found = {}
    for how, needs in (("default", DEFAULT_NEEDS), ("full", ALL_NEEDS)):
        stats = collect(model, calibration, needs=needs, batch_size=1, reservoir_bytes=2**28)
        start = time.perf_counter()
        found[how] = diagnose(stats, recipes, layers=layers_of(stats))
        print(f"{name}: {how} diagnosis in {time.perf_counter() - start:.1f} s", file=sys.stderr)
        print(f"  {found[how].sentence()} Causes: {[c.kind for c in found[how].causes]}", file=sys.stderr)
    plans = {}
    for recipe in recipes:
        try:
            plans[recipe.name] = plan_of(recipe, stats)
        except KvqError as error:
            print(f"  {recipe.name}: {error}", file=sys.stderr)
    windows = Windows(tokens=held_out, first=[first] * len(held_out))
    scores = {recipe: [] for recipe in plans}
    for window in score_windows(model, plans, windows, "stream"):
        for recipe, score in window.items():
            scores[recipe].append(score)
    rows = {}
    for recipe, parts in scores.items():
        rows[recipe] = {
            "kl": float(torch.cat([part.kl for part in parts]).mean()),
            "delta_nll": float(torch.cat([part.losses - part.baseline_losses for part in parts]).mean()),
            "predicted": {how: _loss(diagnosis, recipe) for how, diagnosis in found.items()},
            "mean_error": {how: _error(diagnosis, recipe) for how, diagnosis in found.items()},
        }
        print(f"  {recipe:12} {rows[recipe]}", file=sys.stderr)
    baseline = torch.cat([part.baseline_losses for part in parts])
    return {
        "full_layers": len(stats.spec().full_layers),
        "baseline_nll": float(baseline.mean()),
        "scored_tokens": len(baseline),
        "verdict": {how: diagnosis.sentence() for how, diagnosis in found.items()},
        "causes": {how: [cause.text for cause in diagnosis.causes] for how, diagnosis in found.items()},
        "cause_kinds": {how: [cause.kind for cause in diagnosis.causes] for how, diagnosis in found.items()},
        "recommended": {how: d.recommended.recipe if d.recommended else None for how, d in found.items()},
        "recipes": rows,
    }


def _prediction(diagnosis, recipe: str):
    return next(p for p in diagnosis.predictions if p.recipe == recipe)


def _loss(diagnosis, recipe: str) -> float | None:
    found = _prediction(diagnosis, recipe)
    return None if found.why_not else found.loss


def _error(diagnosis, recipe: str) -> float | None:
    found = _prediction(diagnosis, recipe)
    return None if found.why_not else sum(found.errors.values()) / len(found.errors)


def summary(cases: dict) -> dict:
    """How well predictions agree with what was measured, over all cases and recipes."""
    found = {}
    for how in ("default", "full"):
        pairs = [
            (row["predicted"][how], row["kl"])
            for case in cases.values()
            for row in case["recipes"].values()
            if row["predicted"][how] is not None
        ]
        factors = [abs(math.log(max(p, 1e-5) / max(m, 1e-5))) for p, m in pairs]
        both = sum(p >= COLLAPSE and m >= COLLAPSE for p, m in pairs)
        found[how] = {
            "pairs": len(pairs),
            "rank_correlation": round(spearman(pairs), 3),
            "median_factor": round(math.exp(sorted(factors)[len(factors) // 2]), 2),
            "worst_factor": round(math.exp(max(factors)), 2),
            "collapses_measured": sum(m >= COLLAPSE for _, m in pairs),
            "collapses_foreseen": both,
            "false_alarms": sum(p >= COLLAPSE and m < COLLAPSE for p, m in pairs),
            "called_good": sum(p <= GOOD for p, _ in pairs),
            "called_good_but_collapsed": sum(p <= GOOD and m >= COLLAPSE for p, m in pairs),
        }
    return found


def spearman(pairs: list[tuple[float, float]]) -> float:
    ranks = torch.tensor(pairs, dtype=torch.float64).argsort(0).argsort(0).double()
    return float(torch.corrcoef(ranks.T)[0, 1])


def table(result: dict) -> str:
    lines = [
        "Predicted against measured loss (KL from the exact model, nats per token). Predictions are made before "
        "anything is quantized, from what `kvq calibrate` and `kvq calibrate --full` measure.",
    ]
    for name, case in result["cases"].items():
        causes = "; ".join(case["causes"]["default"]) or "none"
        lines += [
            "",
            f"**{name}** ({case['full_layers']} full-attention layers). Causes found: {causes}. "
            f"{case['verdict']['default']}",
            "",
            "| recipe | predicted | predicted, full | measured |",
            "| --- | ---: | ---: | ---: |",
        ]
        for recipe, row in case["recipes"].items():
            cells = [_cell(row["predicted"][how]) for how in ("default", "full")]
            lines.append(f"| {recipe} | {cells[0]} | {cells[1]} | {row['kl']:.4f} |")
    lines += [
        "",
        "| statistics | pairs | rank correlation | median factor | worst factor | collapses foreseen | false alarms | "
        "called good but collapsed |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for how, found in result["summary"].items():
        lines.append(
            f"| {how} | {found['pairs']} | {found['rank_correlation']} | {found['median_factor']} | "
            f"{found['worst_factor']} | {found['collapses_foreseen']} of {found['collapses_measured']} | "
            f"{found['false_alarms']} | {found['called_good_but_collapsed']} |"
        )
    return "\n".join(lines) + "\n"


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="FILE", help="a plain text of 60 kB or more")
    parser.add_argument("--cases", type=lambda text: text.split(","), metavar="NAME,...")
    parser.add_argument("--recipes", type=lambda text: text.split(","), default=list(RECIPES), metavar="NAME,...")
    parser.add_argument("--json", default=str(RESULTS), metavar="FILE|-")
    arguments = parser.parse_args()
    held = {}
    if arguments.json != "-" and Path(arguments.json).exists():
        held = json.loads(Path(arguments.json).read_text())["cases"]
    wanted = arguments.cases or [name for name in CASES if name not in held]
    for name in wanted:
        held[name] = examine(name, arguments)
        result = {
            "benchmark": "diagnosis",
            "data": Path(arguments.data).name,
            "calibration_windows": CALIBRATION,
            "measured_windows": MEASURED,
            "seq_len": SEQ_LEN,
            "thresholds": {"good": GOOD, "collapse": COLLAPSE},
            "machine": machine(),
            "cases": {case: held[case] for case in CASES if case in held},
        }
        result["summary"] = summary(result["cases"])
        if arguments.json == "-":
            print(json.dumps(result, indent=2))
        else:
            Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n")
            Path(arguments.json).with_suffix(".md").write_text(table(result))


if __name__ == "__main__":
    main()
