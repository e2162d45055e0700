"""What an online Hadamard rotation costs: per head dimension beside attention, and per token of the real model.

    python benchmarks/hadamard.py

One decode step of one layer with 32 query heads and 8 KV heads: rotating its key and its queries, as ``hadamard`` of
keys does, beside exact attention over 2,048 cached tokens in the same library. ``operations`` is the floor: additions
of a fast transform over multiplications and additions of the attention. A large order is a product of two smaller
matrices; ``dense`` and ``split`` time both ways. At last, recipes with and without an online rotation take turns in
decoding with the real model.
"""

import argparse
import json
import math
import os
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import torch
from decode import run
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvq.cache import model_attention as attention
from kvq.models.resolve import resolve_model
from kvq.transforms import hadamard
from kvq.transforms.hadamard import rotate
from kvq.transforms.hadamard_matrix import hadamard_matrix

RESULTS = Path(__file__).parent / "results" / "hadamard.json"
HEAD_DIMS = (64, 80, 96, 112, 128, 160, 192, 256, 512, 576)
QUERY_HEADS, KV_HEADS, CACHED = 32, 8, 2048
# Calls of a turn.
CALLS = 10
PAIRS = ("int4", "quarot4")


def seconds(action, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        action()
    return (time.perf_counter() - start) / calls


def split_or_dense(x: torch.Tensor, dense: bool) -> torch.Tensor:
    hadamard.DENSE_ORDER, kept = (1 << 20 if dense else 1), hadamard.DENSE_ORDER
    try:
        return rotate(x)
    finally:
        hadamard.DENSE_ORDER = kept


@torch.inference_mode()
def one_order(order: int, turns: int) -> dict:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(KV_HEADS, QUERY_HEADS // KV_HEADS, order, generator=generator)
    key = torch.randn(KV_HEADS, 1, order, generator=generator)
    keys, values = (torch.randn(KV_HEADS, CACHED, order, generator=generator) for _ in range(2))

    def attend():
        return ((query @ keys.transpose(-1, -2)) * order**-0.5).softmax(-1) @ values

    sides = {
        "attention": attend,
        "rotation": lambda: (rotate(query), rotate(key)),
        "dense": lambda: (split_or_dense(query, True), split_or_dense(key, True)),
        "split": lambda: (split_or_dense(query, False), split_or_dense(key, False)),
    }
    spent = {name: [] for name in sides}
    for turn in range(turns + 1):
        for name, side in sides.items():
            found = seconds(side, CALLS)
            if turn:
                spent[name].append(found)
    ratio = statistics.median(a / b for a, b in zip(spent["rotation"], spent["attention"]))
    core = order // (order & -order)
    # Butterflies over the power of two, a dense product over what is left.
    additions = (QUERY_HEADS + KV_HEADS) * order * (math.log2(order // core) + (core - 1))
    return {
        "head_dim": order,
        "orthonormal_error": float((hadamard_matrix(order) @ hadamard_matrix(order).T - torch.eye(order)).abs().max()),
        "of_attention": round(ratio, 4),
        "operations": round(additions / (4 * QUERY_HEADS * CACHED * order), 5),
        "microseconds": {name: round(1e6 * statistics.median(values), 1) for name, values in spent.items()},
    }


def decoding(context: int, turns: int) -> dict:
    attention.register()
    folder = resolve_model("builtin")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = run(model, AutoTokenizer.from_pretrained(folder), context, ["DynamicCache", *PAIRS], {}, turns, 8)
    found = {row["method"]: {"tokens_per_s": row["tokens_per_s"], "vs_dynamic": row["vs_dynamic"]} for row in rows}
    return {"model": "builtin", "context": context} | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--context", type=int, default=2048, help="of decoding; 0: leave it out")
    parser.add_argument("--json", default=str(RESULTS), help="file to write, or - for standard output")
    arguments = parser.parse_args()
    result = {
        "benchmark": "hadamard",
        "shape": {"query_heads": QUERY_HEADS, "kv_heads": KV_HEADS, "cached_tokens": CACHED, "dtype": "float32"},
        "orders": [one_order(order, arguments.turns) for order in HEAD_DIMS],
        "decoding": decoding(arguments.context, arguments.turns) if arguments.context else None,
        "machine": {
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "architecture": platform.machine(),
            "python": platform.python_version(),
            "torch": version("torch"),
            "kvq": version("kvq-toolkit"),
        },
    }
    text = json.dumps(result, indent=2) + "\n"
    if arguments.json == "-":
        print(text, end="")
        return
    Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
    Path(arguments.json).write_text(text, encoding="utf-8")
    for row in result["orders"]:
        print(f"{row['head_dim']:4d}  {row['of_attention']:.2%} of attention  {row['microseconds']}")
    print(result["decoding"])


if __name__ == "__main__":
    main()
