"""Quality of every shipped recipe: perplexity, divergence from the exact model, and measured bits per element.

    python benchmarks/quality.py --data wikitext2_valid.txt
    python benchmarks/quality.py --data wikitext2_valid.txt --recipes kivi4,kivi2 --mode simulate --json -

--data is WikiText-2 raw, validation split, one row a line, an empty row being a line that holds one space. Rows are
joined as GPTQ and KVQuant do and tokenised once, without BOS. The first 8,192 tokens calibrate; tokens from 16,384 on
are scored in windows of 2,048 without overlap, in float32 on the CPU. Perplexity is exp of the mean of the windows'
mean losses; differences are paired with the exact model on the same tokens, their standard errors taken over windows.
"""

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from kvq.cache import make_plan
from kvq.calib.artefacts import fit_artefacts
from kvq.calib.collect import collect
from kvq.calib.needs import needs_of
from kvq.calib.stats import Stats
from kvq.eval.divergence import divergence
from kvq.eval.likelihood import score_windows
from kvq.eval.measured_bits import measured_bits
from kvq.eval.perplexity import cut_windows, perplexity
from kvq.eval.result import installed_versions
from kvq.eval.two_view import MODES
from kvq.models.describe import describe
from kvq.models.resolve import load_config, load_model, load_tokenizer, resolve_model
from kvq.recipe import list_recipes, load_recipe

RESULTS = Path(__file__).parent / "results"
CALIBRATION_TOKENS, FIRST_TOKEN, SEQ_LEN = 8192, 16384, 2048


def wikitext_tokens(file: Path, tokenizer) -> list[int]:
    rows = file.read_text(encoding="utf-8").split("\n")[:-1]
    text = "\n\n".join("" if row == " " else row + "\n" for row in rows)
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def measure(arguments: argparse.Namespace) -> dict:
    folder = resolve_model(arguments.model)
    model = load_model(folder, dtype=torch.float32, device="cpu")
    spec = describe(load_config(folder))
    ids = wikitext_tokens(Path(arguments.data), load_tokenizer(folder))
    calibration = torch.tensor(ids[:CALIBRATION_TOKENS]).view(-1, SEQ_LEN)
    recipes = {name: load_recipe(name) for name in arguments.recipes}
    needs = frozenset().union(*(needs_of(recipe, spec) for recipe in recipes.values()))
    stats = Stats.load(arguments.stats) if arguments.stats else collect(model, calibration, needs=needs, batch_size=1)
    plans = {
        name: make_plan(recipe, spec, fit_artefacts(recipe, spec, stats, folder)) for name, recipe in recipes.items()
    }
    windows = cut_windows(ids[FIRST_TOKEN:], SEQ_LEN, limit=arguments.windows, mode=arguments.mode)
    scores = {name: [] for name in plans}
    start = time.perf_counter()
    found = score_windows(model, plans, windows, arguments.mode, chunk=arguments.chunk)
    for window in track(found, total=arguments.windows, console=Console(stderr=True)):
        for name, score in window.items():
            scores[name].append(score)
    return {
        "schema_version": 1,
        "model": arguments.model,
        "mode": arguments.mode,
        "chunk": arguments.chunk if arguments.mode == "chunked" else None,
        "data": {
            "file": Path(arguments.data).name,
            "sha256": hashlib.sha256(Path(arguments.data).read_bytes()).hexdigest(),
            "first_token": FIRST_TOKEN,
            "calibration_tokens": CALIBRATION_TOKENS,
        },
        "seq_len": SEQ_LEN,
        "windows": arguments.windows,
        "dtype": "float32",
        "cache_dtype": str(spec.dtype).removeprefix("torch."),
        "seconds": round(time.perf_counter() - start, 1),
        "versions": installed_versions(),
        "recipes": {name: row(plans[name], scores[name], spec) for name in plans},
    }


def row(plan, scores, spec) -> dict:
    text, distance = perplexity(scores), divergence(scores)
    return {
        "recipe_hash": plan.recipe.hash,
        "perplexity": text.value,
        "baseline": text.baseline,
        "delta_nll": text.delta_nll,
        "delta_nll_stderr": text.delta_nll_stderr,
        "kl": distance.kl,
        "kl_stderr": distance.kl_stderr,
        "kl_p99": distance.kl_p99,
        "kl_max": distance.kl_max,
        "top1": distance.top1,
        "bits_per_element": measured_bits(plan, SEQ_LEN, spec.dtype),
        "asymptotic_bits": plan.bits_per_element,
        "tokens": text.tokens,
    }


def table(result: dict) -> str:
    """The results as a Markdown table, most bits first."""
    data, length = result["data"], result["seq_len"]
    lines = [
        f"SmolLM2-135M-Instruct, float32, mode `{result['mode']}`, {result['windows']} windows of {length} tokens of "
        f"{data['file']} from token {data['first_token']:,}. Bits are measured on a filled cache of {length} "
        f"tokens ({result['cache_dtype']} for exact ones); 'codes' counts codes and metadata alone.",
        "",
        "| recipe | bits | codes | perplexity | delta NLL | KL (nats) | KL p99 | top-1 |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, found in sorted(result["recipes"].items(), key=lambda item: -item[1]["bits_per_element"]):
        error = found["delta_nll_stderr"]
        delta = f"{found['delta_nll']:.4f}" + ("" if error is None else f" ± {error:.4f}")
        bits = f"{found['bits_per_element']:.2f} | {found['asymptotic_bits']:.2f}"
        lines.append(
            f"| {name} | {bits} | {found['perplexity']:.3f} | {delta} | {found['kl']:.5f} | {found['kl_p99']:.4f} | "
            f"{found['top1']:.4f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="FILE", help="WikiText-2 validation rows")
    parser.add_argument("--model", default="builtin", help="default: the embedded model")
    parser.add_argument("--recipes", type=lambda text: text.split(","), default=list_recipes(), metavar="NAME,...")
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--mode", choices=MODES, default="stream")
    parser.add_argument("--chunk", type=int, default=512, help="tokens a chunk, mode chunked")
    parser.add_argument("--stats", metavar="FILE", help="statistics to use instead of calibrating here")
    parser.add_argument("--json", metavar="FILE|-", help="default: results/quality.json, beside its table quality.md")
    arguments = parser.parse_args()
    result = measure(arguments)
    print(table(result), file=sys.stderr if arguments.json == "-" else sys.stdout)
    text = json.dumps(result, indent=2) + "\n"
    if arguments.json == "-":
        print(text, end="")
        return
    target = Path(arguments.json) if arguments.json else RESULTS / "quality.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(text, encoding="utf-8")
    target.with_suffix(".md").write_text(table(result), encoding="utf-8")


if __name__ == "__main__":
    main()
