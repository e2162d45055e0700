"""Encode and decode throughput of every recipe's codecs, beside a copy of the same bytes.

    python benchmarks/codecs.py --json benchmarks/results/codecs.json

Keys or values of a block of tokens go through a codec (codes and metadata; packing into words is measured apart) and
back. Each turn measures a copy of the input, then encode, then decode, so that a change of the machine's pace meets all
three; the figures are medians over turns. Gigabytes are those of the input at 16 bits a number; the floor of both
directions is the copy, which reads and writes as many numbers once. Stand-ins take the place of what calibration makes,
since no speed depends on it.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

from kvq.codecs import CodecSpec
from kvq.eval.result import installed_versions
from kvq.pages.bits import pack_codes, unpack_codes
from kvq.recipe import list_recipes, load_recipe

RESULTS = Path(__file__).parent / "results"
SHAPES = {"SmolLM2-135M": (3, 64), "8 heads of 128": (8, 128)}


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(spec: CodecSpec, x: torch.Tensor, turns: int) -> dict:
    """Throughput of one codec on x [1, K, T, head_dim] (bfloat16), in gigabytes of x a second."""
    heads, head_dim = x.shape[1], x.shape[3]
    codec = spec.stand_in(head_dim, heads)
    tokens = x.shape[2] // codec.page_tokens * codec.page_tokens
    x = x[:, :, :tokens].contiguous()
    target = torch.empty_like(x)
    layout = codec.layout(codec.page_tokens)
    encoded = codec.encode(x)
    codec.decode(encoded, torch.float32)
    planes = layout.words_bytes > 0
    words = pack_codes(encoded.codes, layout) if planes else None
    times: dict[str, list[float]] = {}
    for _ in range(turns):
        turn = {
            "copy": seconds(lambda: target.copy_(x)),
            "encode": seconds(lambda: codec.encode(x)),
            "decode": seconds(lambda: codec.decode(encoded, torch.float32)),
        }
        if planes:
            turn["pack"] = seconds(lambda: pack_codes(encoded.codes, layout))
            turn["unpack"] = seconds(lambda: unpack_codes(words, layout))
        for what, taken in turn.items():
            times.setdefault(what, []).append(taken)
    found = {f"{what}_gb_s": x.nbytes / statistics.median(taken) / 1e9 for what, taken in times.items()}
    for what in times.keys() - {"copy"}:
        found[f"{what}_of_copy"] = statistics.median(a / b for a, b in zip(times["copy"], times[what]))
    return found | {"bits": layout.bits_per_element(heads)}


def distinct(names: list[str]) -> dict[str, CodecSpec]:
    """Codecs of recipes by ``recipe key`` or ``recipe value``, each kind of codec once."""
    found: dict[CodecSpec, str] = {}
    for name in names:
        for side in ("key", "value"):
            spec = getattr(load_recipe(name), side)
            if spec.codec != "exact":
                found.setdefault(spec, f"{name} {side}")
    return {name: spec for spec, name in found.items()}


def table(result: dict) -> str:
    lines = [
        f"{result['device']}, {result['threads']} threads, {result['tokens']} tokens, bfloat16 in, float32 out; "
        f"medians of {result['turns']} turns. Shares of a copy's throughput, which is in the third column (GB/s).",
    ]
    for shape, rows in result["shapes"].items():
        lines += ["", f"**{shape}**", "", "| codec | bits | copy | encode | decode | pack | unpack |"]
        lines += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
        for name, row in sorted(rows.items(), key=lambda item: -item[1]["bits"]):
            shares = " | ".join(
                f"{row[f'{what}_of_copy']:.3f}" if f"{what}_of_copy" in row else "-"
                for what in ("encode", "decode", "pack", "unpack")
            )
            lines.append(f"| {name} | {row['bits']:.2f} | {row['copy_gb_s']:.1f} | {shares} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", type=lambda text: text.split(","), default=list_recipes(), metavar="NAME,...")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1, help="more of them disturb each other on a busy machine")
    parser.add_argument("--device", default="cpu", choices=("cpu",), help="the only one that is timed so far")
    parser.add_argument("--json", metavar="FILE|-", help="default: results/codecs.json, with its table")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    specs = distinct(arguments.recipes)
    shapes = {}
    for shape, (heads, head_dim) in SHAPES.items():
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, heads, arguments.tokens, head_dim, generator=generator).to(torch.bfloat16)
        shapes[shape] = {}
        for name, spec in specs.items():
            shapes[shape][name] = measure(spec, x, arguments.turns)
    result = {
        "schema_version": 1,
        "device": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "tokens": arguments.tokens,
        "turns": arguments.turns,
        "versions": installed_versions(),
        "shapes": shapes,
    }
    print(table(result), file=sys.stderr if arguments.json == "-" else sys.stdout)
    text = json.dumps(result, indent=2) + "\n"
    if arguments.json == "-":
        print(text, end="")
        return
    target = Path(arguments.json) if arguments.json else RESULTS / "codecs.json"
    target.write_text(text, encoding="utf-8")
    target.with_suffix(".md").write_text(table(result), encoding="utf-8")


if __name__ == "__main__":
    main()
