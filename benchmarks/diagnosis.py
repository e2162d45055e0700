"""Does the diagnosis foresee what recipes do? Predicted against measured loss, on a real model and on made ones.

    python benchmarks/diagnosis.py --data wikitext2_valid.txt
    python benchmarks/diagnosis.py --data wikitext2_valid.txt --cases smollm2,few_layers --json -

Every case is a model: SmolLM2-135M-Instruct as it is; the same with a large key bias and with massive activations that
reach its keys; and a model made by hand whose recall passes through one full-attention layer, or through twelve
(``made_models.py``). Each is calibrated on one text, diagnosed from the statistics alone, and then quantized and
measured on another text: KL divergence from the exact model in nats per token, mode stream. Predictions are made twice,
with what plain ``kvq calibrate`` measures and with ``--full``.

--work keeps what takes long, statistics and measured losses of each case; an interrupted run continues with it.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from dataclasses import replace
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
from kvq.calib.needs import ALL_NEEDS, DEFAULT_NEEDS
from kvq.calib.stats import LayerStats, Stats
from kvq.diagnosis import CANDIDATES, diagnose, layers_of
from kvq.diagnosis.predict import COLLAPSE, GOOD, plan_of
from kvq.eval.likelihood import Windows, score_windows
from kvq.models.resolve import load_model, load_tokenizer, resolve_model
from kvq.recipe import load_recipe

RESULTS = Path(__file__).parent / "results" / "diagnosis.json"
RECIPES = (*CANDIDATES, "int3")
# The channel in which SmolLM2's first token has its massive activation, and how large its keys are made.
MASSIVE_CHANNEL, MASSIVE_SIZE = 507, 400.0
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
    work = Path(arguments.work) / name
    work.mkdir(parents=True, exist_ok=True)
    folder, file, losses = work / "model", work / "stats.safetensors", work / "losses.json"
    model = None
    if not file.exists():
        model, calibration, held_out, first = CASES[name](arguments)
        # For transforms that read weights.
        if not folder.exists():
            model.save_pretrained(folder)
        settings = {"needs": ALL_NEEDS, "batch_size": 1, "reservoir_bytes": 2**28, "state_folder": work / "state"}
        collect(model, calibration, **settings).save(file)
    full = Stats.load(file)
    recipes = [load_recipe(recipe) for recipe in arguments.recipes]
    found = {}
    for how, stats in (("default", only(full, DEFAULT_NEEDS)), ("full", full)):
        start = time.perf_counter()
        found[how] = diagnose(stats, recipes, layers=layers_of(stats), folder=folder)
        print(f"{name}: {how} diagnosis in {time.perf_counter() - start:.1f} s", file=sys.stderr)
        print(f"  {found[how].sentence()} Causes: {[c.kind for c in found[how].causes]}", file=sys.stderr)
    held = json.loads(losses.read_text()) if losses.exists() else {}
    missing = [
        recipe for recipe in recipes if recipe.name not in held and not _prediction(found["full"], recipe).why_not
    ]
    if missing:
        if model is None:
            model, calibration, held_out, first = CASES[name](arguments)
        held_out = held_out[: arguments.windows]
        windows = Windows(tokens=held_out, first=[first] * len(held_out))
        for recipe in missing:
            held |= measured(model, {recipe.name: plan_of(recipe, full, folder)}, windows)
            losses.write_text(json.dumps(held, indent=1))
    rows = {}
    for recipe in recipes:
        if recipe.name in held:
            predicted = {how: _prediction(diagnosis, recipe) for how, diagnosis in found.items()}
            rows[recipe.name] = held[recipe.name] | {
                "predicted": {how: None if p.why_not else p.loss for how, p in predicted.items()},
                "verdict": {how: p.verdict for how, p in predicted.items()},
            }
            print(f"  {recipe.name:12} {rows[recipe.name]}", file=sys.stderr)
    return {
        "full_layers": len(full.spec().full_layers),
        "verdict": {how: diagnosis.sentence() for how, diagnosis in found.items()},
        "causes": {how: [cause.text for cause in diagnosis.causes] for how, diagnosis in found.items()},
        "cause_kinds": {how: [cause.kind for cause in diagnosis.causes] for how, diagnosis in found.items()},
        "recommended": {how: d.recommended.recipe if d.recommended else None for how, d in found.items()},
        "recipes": rows,
    }


def only(stats: Stats, needs: frozenset[str]) -> Stats:
    layers = {
        index: LayerStats({need: part for need, part in layer.items() if need in needs})
        for index, layer in stats.layers.items()
    }
    return replace(stats, layers=layers)


def measured(model, plans, windows: Windows) -> dict[str, dict[str, float]]:
    scores = {recipe: [] for recipe in plans}
    for window in score_windows(model, plans, windows, "stream"):
        for recipe, score in window.items():
            scores[recipe].append(score)
    return {
        recipe: {
            "kl": float(torch.cat([part.kl for part in parts]).mean()),
            "delta_nll": float(torch.cat([part.losses - part.baseline_losses for part in parts]).mean()),
            "baseline_nll": float(torch.cat([part.baseline_losses for part in parts]).mean()),
            "tokens": sum(len(part.kl) for part in parts),
        }
        for recipe, parts in scores.items()
    }


def _prediction(diagnosis, recipe):
    return next(p for p in diagnosis.predictions if p.recipe == recipe.name)


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
    parser.add_argument("--cases", type=lambda text: text.split(","), default=list(CASES), metavar="NAME,...")
    parser.add_argument("--windows", type=int, default=MEASURED, help="measured windows, for what --work does not hold")
    parser.add_argument("--work", metavar="FOLDER", help="default: a temporary folder")
    parser.add_argument("--recipes", type=lambda text: text.split(","), default=list(RECIPES), metavar="NAME,...")
    parser.add_argument("--json", default=str(RESULTS), metavar="FILE|-")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        arguments.work = arguments.work or temporary
        cases = {name: examine(name, arguments) for name in arguments.cases}
    result = {
        "benchmark": "diagnosis",
        "data": Path(arguments.data).name,
        "calibration_windows": CALIBRATION,
        "seq_len": SEQ_LEN,
        "thresholds": {"good": GOOD, "collapse": COLLAPSE},
        "machine": machine(),
        "cases": cases,
        "summary": summary(cases),
    }
    if arguments.json == "-":
        print(json.dumps(result, indent=2))
    else:
        Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n")
        Path(arguments.json).with_suffix(".md").write_text(table(result))


if __name__ == "__main__":
    main()
