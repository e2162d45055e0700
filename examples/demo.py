"""The whole way through kvq by its own commands, and one table at the end: fp16 beside kivi2. ``make demo`` runs it.

python examples/demo.py --model builtin --out demo-output
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

from rich import box
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

import kvq

RECIPE = "kivi2"
# Longer than the 128 tokens that the recipe keeps exact, so that the answer is read out of packed pages.
QUESTION = """\
A language model writes one token at a time. To choose the next token, its attention layers look back at every token so
far: they compare a query, made from the newest token, with a key of each earlier token, and take a weighted mean of the
values that belong to those keys. Keys and values of a token never change once they are computed, so they are kept in
memory instead of being computed again at each step. This memory is called the KV cache. It makes each step much
cheaper, but it grows with every token of the conversation, in every layer of the model. For long conversations, or for
many users at once, the cache becomes larger than the weights of the model, and reading it at every step takes longer
than everything else. A quantized cache stores the same keys and values in fewer bits. The newest tokens are often kept
exact, because they matter most for what comes next, and older tokens are packed into pages of small integer codes, with
a scale and a minimum for each group of codes. The model then reads the packed pages while it writes.

In one short paragraph, explain why the KV cache grows and how quantization helps."""
EVAL_WINDOWS, EVAL_TOKENS = 2, 2048
SPEED_CONTEXT, SPEED_TOKENS = 2048, 32
console = Console(highlight=False)


def command(title: str, *args: str, stdin: str | None = None, quiet: bool = False) -> None:
    """Run one command of kvq as a user would, and stop the demo if it fails."""
    console.print(f"\n[bold]{title}[/bold]")
    print(f"$ kvq {shlex.join(args)}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "kvq.cli", *args],
        input=stdin,
        text=True,
        stdout=subprocess.DEVNULL if quiet else None,
        check=False,
    )
    if done.returncode:
        sys.exit(done.returncode)


def long_prompt(model: str) -> str:
    """About SPEED_CONTEXT tokens of the reference that every Python carries."""
    tokenizer = AutoTokenizer.from_pretrained(kvq.resolve_model(model))
    ids = tokenizer(topics["specialnames"][: 8 * SPEED_CONTEXT], add_special_tokens=False, verbose=False)
    return tokenizer.decode(ids["input_ids"][:SPEED_CONTEXT])


def run(model: str, out: Path) -> dict[str, dict]:
    """Run every step and return what the commands reported."""
    out.mkdir(parents=True, exist_ok=True)
    stats, export = str(out / "stats.safetensors"), str(out / RECIPE)
    reports = {name: str(out / f"{name}.json") for name in ("eval", "fp16", RECIPE)}
    command("1. Calibrate: measure keys and values", "calibrate", model, "-o", stats, "--samples", "16", quiet=True)
    command("2. Export", "export", model, "--recipe", RECIPE, "--stats", stats, "-o", export, "--force")
    sizes = ("--seq-len", str(EVAL_TOKENS), "--limit", str(EVAL_WINDOWS))
    command("3. Evaluate: read the quantized cache", "eval", export, *sizes, "--json", reports["eval"])
    command(
        "4. Generate: answer a question about a text on stdin",
        "generate",
        export,
        "--max-new-tokens",
        "96",
        stdin=QUESTION,
    )
    prompt = long_prompt(model)
    speed = ("--raw", "--ignore-eos", "--max-new-tokens", str(SPEED_TOKENS))
    title = f"5. Speed at {SPEED_CONTEXT:,} tokens of context"
    for name, source in (("fp16", model), (RECIPE, export)):
        command(f"{title}, {name}", "generate", source, *speed, "--json", reports[name], stdin=prompt, quiet=True)
    return {name: json.loads(Path(path).read_text()) for name, path in reports.items()}


def summary(reports: dict[str, dict], model: str) -> tuple[Table, str]:
    """The table of the run, and what it means in one sentence."""
    results, bits = reports["eval"]["results"], reports["eval"]["bits_per_element"]
    plain, packed = reports["fp16"], reports[RECIPE]
    tokens = packed["cache"]["tokens"]
    mib = [packed["cache"][name] / 2**20 for name in ("fp16_bytes", "bytes_in_16_bit")]
    perplexity = [results["perplexity"][name] for name in ("baseline", "value")]
    table = Table(
        title=f"{model}: fp16 cache beside {RECIPE}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for name, justify in (("", "left"), ("fp16", "right"), (RECIPE, "right"), ("better is", "left")):
        table.add_column(name, justify=justify)
    table.add_row("perplexity", *(f"{value:.3f}" for value in perplexity), "lower")
    table.add_row("KL from fp16, nats per token", "0", f"{results['divergence']['kl']:.4f}", "lower")
    table.add_row(f"cache of {tokens:,} tokens, MiB", *(f"{value:.1f}" for value in mib), "lower")
    table.add_row(f"bits per element at {EVAL_TOKENS:,} tokens", "16", f"{bits:.2f}", "lower")
    table.add_row(
        f"tokens/s at {tokens:,} tokens", *(f"{run['tokens_per_second']:.1f}" for run in (plain, packed)), "higher"
    )
    sentence = (
        f"With {RECIPE}, a text of {tokens:,} tokens needs {mib[1]:.1f} MiB of cache instead of {mib[0]:.1f} "
        f"({mib[0] / mib[1]:.1f}x less), and perplexity goes from {perplexity[0]:.2f} to {perplexity[1]:.2f}."
    )
    return table, sentence


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin", help="builtin, a checkpoint folder or a hub id")
    parser.add_argument("--out", type=Path, default=Path("demo-output"))
    args = parser.parse_args()
    start = time.monotonic()
    reports = run(args.model, args.out)
    table, sentence = summary(reports, args.model)
    console.print()
    console.print(table)
    console.print(sentence, soft_wrap=True)
    caches = [reports[name]["cache"] for name in ("fp16", RECIPE)]
    held = " and ".join(f"{cache['bytes'] / 2**20:.1f}" for cache in caches)
    console.print(
        f"[dim]Perplexity and KL: {EVAL_WINDOWS} windows of {EVAL_TOKENS:,} tokens. Memory: with exact numbers in 16 "
        f"bits, as on a GPU; this run, in {caches[0]['exact_dtype']}, held {held} MiB. "
        f"Speed: batch 1, {SPEED_TOKENS} tokens, {RECIPE} with {caches[1]['implementation']}, "
        f"{os.cpu_count()} cores. The whole run took {(time.monotonic() - start) / 60:.1f} minutes.[/dim]",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
