"""Everything that needs a GPU, in one call.

    python benchmarks/gpu.py                               all parts; writes benchmarks/results/gpu.json and gpu.md
    python benchmarks/gpu.py --parts correctness kernels   some of them
    python benchmarks/gpu.py --model ./llama-8b            end to end with another model than the embedded one

    correctness   tests/kernels and tests/integrations/test_implementations.py on the device: every kernel
                  against fp64, graph capture and replay, equal bits from equal plans
    kernels       the tables of decode attention with their goals beside: fractions of the copy bandwidth, batched and
                  long; latency of one sequence
    packing       quantize and pack: fraction of the copy bandwidth; append of a token
    model         tokens/s and peak memory of a model with each recipe, by batch and context, and the largest batch

A part that fails is written down as failed, the others go on, and the exit code is 1.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch

from kvq.bench import bench, timing
from kvq.bench.roofline import Shape, exact_bytes
from kvq.bench.samples import codec_of, layout_of
from kvq.kernels.pack import pack_tokens
from kvq.kernels.types import Source
from kvq.pages.pages import Pages

sys.path.insert(0, str(Path(__file__).parent / "kernels"))
from peers import PEERS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# Goals for an H200 (docs/kernels.md): share of the copy bandwidth, and speed against the best 16-bit attention.
FRACTIONS = {"8s": (0.92, 1.85), "4": (0.88, 3.4), "3s": (0.82, 4.3), "2": (0.75, 5.4), "nf4": (0.80, 3.1)}
BATCHED = ["32x32K", "64x4K", "8x32K", "8x128K", "32x32K,kv=4,g=8", "32x32K,kv=2,g=16", "8x32K,kv=32,g=1"]
# Microseconds of one sequence by tokens: (4 bits, 2 bits).
LATENCIES = {"1x4K": (8, 8), "1x32K": (17, 14), "1x128K": (52, 36)}
CONTEXTS, BATCHES = (1024, 8192, 32768), (1, 8, 32)
RECIPES = ("fp16", "int4", "kivi2", "int2", "fp8")


def correctness(args) -> dict:
    """The test suite of the kernels, compiled instead of interpreted."""
    tests = ["tests/kernels", "tests/integrations/test_implementations.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    last = done.stdout.strip().splitlines()[-1:] or [done.stderr[-500:]]
    if done.returncode:
        raise RuntimeError(f"{last[0]}\n{done.stdout[-4000:]}")
    return {"summary": last[0]}


def kernels(args) -> dict:
    device = torch.device("cuda")
    widths = list(FRACTIONS)
    tables = []
    for text in (*BATCHED, *LATENCIES):
        shape = Shape.parse(text)
        bench.refuse_too_large([shape], widths[:1], device)
        report = bench.bench([shape], [*widths, "kivi2", "e4m3"], device, "triton", PEERS)
        for row in report["rows"]:
            row["goal"] = _goal(text, row["width"])
        tables.append(report)
        torch.cuda.empty_cache()
    return {"tables": tables}


def _goal(shape: str, width: str) -> dict | None:
    if shape in LATENCIES:
        goals = dict(zip(("4", "2"), LATENCIES[shape]))
        return {"microseconds": goals[width]} if width in goals else None
    if width not in FRACTIONS:
        return None
    fraction, speed = FRACTIONS[width]
    wide = ",g=16" in shape
    return {"fraction": {"4": 0.85, "2": 0.65}.get(width, fraction) if wide else fraction} | (
        {"vs_exact": speed} if shape == "32x32K" else {}
    )


def packing(args) -> dict:
    """Bulk packing of 32K tokens of 8 heads, and the append of one token of 64 sequences."""
    device, rows = torch.device("cuda"), []
    for width, goal in (("4", 0.80), ("2", 0.80), ("4c32", 0.65), ("2c32", 0.65)):
        for tokens, batch in ((32768, 1), (1, 64)):
            if tokens == 1 and "c" in width:
                continue
            layout = layout_of(width, "4")
            calls = [_pack_call(width, layout, tokens, batch, device) for _ in range(4)]
            times = timing.time_in_turns({"pack": calls, "copy": [timing.copy_call(device)]}, device)
            moved = batch * 8 * tokens * (2 * 128 + layout.record_bytes // (2 * layout.page_tokens))
            ratio = zip(times["pack"], times["copy"])
            fraction = statistics.median(moved / p / (timing.copied_bytes(device) / c) for p, c in ratio)
            seconds = statistics.median(times["pack"])
            goal_text = "at most 4 us" if tokens == 1 else f"at least {goal:.0%} of copy"
            rows.append(
                {"width": width, "tokens": tokens, "batch": batch, "seconds": seconds, "fraction": fraction}
                | {"goal": goal_text}
            )
    return {"rows": rows}


def _pack_call(width: str, layout, tokens: int, batch: int, device):
    x = torch.randn(batch, 8, tokens, 128, device=device, dtype=torch.bfloat16)
    count = -(-tokens // layout.page_tokens)
    pool = torch.zeros(batch * count, 8, layout.record_bytes, dtype=torch.uint8, device=device)
    table = torch.arange(batch * count, dtype=torch.int32, device=device).view(batch, count)
    pages = Pages.of(layout, pool, table)
    ranges = torch.tensor([[0, tokens]], dtype=torch.int32, device=device).repeat(batch, 1)
    source = Source(x=x, ranges=ranges, offsets=torch.zeros(batch, dtype=torch.int32, device=device), longest=tokens)
    codec = codec_of(width, 128)
    return lambda: pack_tokens(source, pages, "key", codec, impl="triton")


def model(args) -> dict:
    """Tokens/s of decoding and peak memory through from-pretrained's cache, recipe by recipe."""
    from kvq.cache import implementations
    from kvq.integrations.runtime import new_cache, quantized_cache
    from kvq.models.resolve import load_model, resolve_model

    loaded = load_model(resolve_model(args.model)).to("cuda", torch.bfloat16).eval()
    limit = getattr(loaded.config, "max_position_embeddings", 1 << 30)
    rows = []
    for context in (c for c in CONTEXTS if c <= limit):
        for recipe in RECIPES:
            fits = 0
            for batch in BATCHES + tuple(64 * 2**i for i in range(8)):
                try:
                    row = _decode(loaded, recipe, batch, context, new_cache, quantized_cache, implementations)
                except torch.cuda.OutOfMemoryError:
                    break
                finally:
                    torch.cuda.empty_cache()
                fits = batch
                if batch in BATCHES:
                    rows.append(row)
            rows.append({"recipe": recipe, "context": context, "largest_batch": fits})
    return {"model": args.model, "rows": rows}


@torch.inference_mode()
def _decode(loaded, recipe, batch, context, new_cache, quantized_cache, implementations, steps: int = 16) -> dict:
    from transformers import DynamicCache

    torch.cuda.reset_peak_memory_stats()
    ids = torch.randint(3, loaded.config.vocab_size - 1, (batch, context), device="cuda")
    exact = recipe == "fp16"

    def run() -> tuple[float, list[str]]:
        cache = DynamicCache(config=loaded.config) if exact else new_cache(loaded)
        for part in ids.split(max(16, 16384 // batch), dim=1):
            loaded.base_model(part, past_key_values=cache)
        token = ids[:, :1]
        for _ in range(3):
            loaded(token, past_key_values=cache)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            token = loaded(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        torch.cuda.synchronize()
        return batch * steps / (time.perf_counter() - start), [] if exact else implementations(cache)

    if exact:
        speed, ran = run()
    else:
        with quantized_cache(loaded, recipe, _unit_scales(loaded) if recipe == "fp8" else None):
            speed, ran = run()
    peak = torch.cuda.max_memory_allocated()
    facts = {"recipe": recipe, "context": context, "batch": batch}
    return facts | {"tokens_per_s": speed, "peak_bytes": peak, "implementation": ran}


def _unit_scales(loaded) -> dict[str, torch.Tensor]:
    from kvq.models.describe import describe

    layers = describe(loaded.config).full_layers
    return {f"layers.{layer.index}.{side}.scale": torch.tensor(1.0) for layer in layers for side in ("key", "value")}


PARTS = {"correctness": correctness, "kernels": kernels, "packing": packing, "model": model}


def as_markdown(report: dict) -> str:
    lines = [f"# {report['facts']['gpu']}", "", ", ".join(f"{k} {v}" for k, v in report["facts"].items()), ""]
    for name, part in report["parts"].items():
        lines += [f"## {name}", ""]
        if "failed" in part:
            lines += [f"Failed: {part['failed'].splitlines()[0]}", ""]
            continue
        lines += [part["summary"], ""] if "summary" in part else []
        for table in part.get("tables", ()):
            lines += _markdown_bench(table)
        if "rows" in part:
            lines += _markdown_rows(part["rows"])
    return "\n".join(lines)


def _markdown_bench(report: dict) -> list[str]:
    found = []
    for exact in report["exact"]:
        best = min(exact["seconds"], key=exact["seconds"].get)
        size = exact_bytes(Shape.parse(exact["shape"]), 2) / 2**20
        found += [
            f"{exact['shape']}: copy {report['copy_bandwidth'] / 1e9:.0f} GB/s; best 16-bit attention {best} "
            f"{exact['seconds'][best] * 1e6:.1f} us ({exact['fraction'][best]:.0%} of copy, {size:.0f} MiB); "
            + "; ".join(f"{name}: {why}" for name, why in exact["not_run"].items()),
            "",
        ]
    rows = [
        {
            "width": row["width"],
            "error": f"{row['error']:.1e}",
            "us": row["note"] or f"{row['seconds'] * 1e6:.1f}",
            "of copy": "" if row["note"] else f"{row['fraction']:.0%}",
            "vs exact": "" if row["note"] else f"{row['vs_best_exact']:.2f}",
            "goal": ", ".join(f"{k} {v}" for k, v in (row["goal"] or {}).items()),
            "ran": row["ran"],
        }
        for row in report["rows"]
    ]
    return found + _markdown_rows(rows)


def _markdown_rows(rows: list[dict]) -> list[str]:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return [*lines, *("| " + " | ".join(str(row.get(name, "")) for name in columns) + " |" for row in rows), ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs a CUDA device, and there is none: nothing was measured.")
    import triton

    major, minor = torch.cuda.get_device_capability()
    facts = {
        "gpu": torch.cuda.get_device_name(),
        "capability": f"{major}.{minor}",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }
    report = {"facts": facts, "parts": {}}
    for name in args.parts:
        print(f"{name} ...", flush=True)
        try:
            report["parts"][name] = PARTS[name](args)
        except Exception as error:
            report["parts"][name] = {"failed": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
            print(report["parts"][name]["traceback"], flush=True)
        # After every part, so that an interruption loses one part only.
        args.out.write_text(json.dumps(report, indent=2, default=str) + "\n")
        args.out.with_suffix(".md").write_text(as_markdown(report) + "\n")
    sys.exit(any("failed" in part for part in report["parts"].values()))


if __name__ == "__main__":
    main()
