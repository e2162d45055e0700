"""Decode speed and cache bytes: kvq recipes beside DynamicCache and the native quantized cache, in one run.

    python benchmarks/decode.py --json benchmarks/results/decode.json

Every cache is filled with the same keys and values of a real prompt. The methods then take turns, a few tokens each, so
that a change of the machine's pace meets all of them. Reported: tokens/s (median over turns), the ratio to
DynamicCache and to the best native quantized cache of the same turn, the peak of the measured cache bytes, and how far
they were from the prediction at most (both after every turn).
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, QuantizedCache

from kvq.cache import cache_nbytes, implementations, make_plan
from kvq.cache import model_attention as attention
from kvq.calib.artefacts import stand_in_artefacts
from kvq.calib.data import builtin_text
from kvq.integrations.runtime import install, new_cache, uninstall
from kvq.models.describe import describe
from kvq.models.resolve import resolve_model
from kvq.recipe import load_recipe

RECIPES = ["klt4", "klt3", "klt2", "kivi2", "int4", "turboquant3", "kvquant3"]
NATIVE = {
    "quanto-4": {"backend": "quanto", "nbits": 4, "q_group_size": 64},
    "quanto-2": {"backend": "quanto", "nbits": 2, "q_group_size": 64},
    "hqq-4": {"backend": "hqq", "nbits": 4, "q_group_size": 64, "axis_key": 1, "axis_value": 1},
    "hqq-2": {"backend": "hqq", "nbits": 2, "q_group_size": 64, "axis_key": 1, "axis_value": 1},
}


class Method:
    """One cache under test: how it is made, filled and run."""

    def __init__(self, name: str, model, artefacts: dict[str, torch.Tensor]):
        self.name, self.model = name, model
        self.plan = None
        if name in NATIVE:
            self.cache = QuantizedCache(config=model.config, **NATIVE[name])
        elif name == "DynamicCache":
            self.cache = DynamicCache(config=model.config)
        else:
            self.plan = make_plan(load_recipe(name), describe(model.config), artefacts or made_up(model, name))
            install(model, self.plan)
            self.cache = new_cache(model)
            uninstall(model)
        self.speeds: list[float] = []
        self.peak = 0
        self.off = 0.0

    def fill(self, source: DynamicCache) -> None:
        for i, layer in enumerate(source.layers):
            self.cache.update(layer.keys, layer.values, i)

    @torch.inference_mode()
    def turn(self, tokens: int, token: torch.Tensor) -> float:
        """Decode ``tokens`` tokens greedily; returns tokens/s."""
        if self.plan is not None:
            install(self.model, self.plan)
        start = time.perf_counter()
        for _ in range(tokens):
            logits = self.model(token, past_key_values=self.cache, use_cache=True).logits
            token = logits[:, -1:].argmax(-1)
        speed = tokens / (time.perf_counter() - start)
        if self.plan is not None:
            uninstall(self.model)
        self.peak = max(self.peak, self.nbytes())
        if self.plan is not None:
            predicted = self.plan.predicted_bytes(self.cache.get_seq_length(), self.model.dtype.itemsize)
            self.off = max(self.off, abs(self.nbytes() / predicted - 1))
        return speed

    def nbytes(self) -> int:
        if self.name not in NATIVE:
            return cache_nbytes(self.cache)
        return sum(_native_bytes(layer) for layer in self.cache.layers)


def _native_bytes(layer) -> int:
    total = sum(t.nbytes for t in (layer.keys, layer.values))
    for stored in (layer._quantized_keys, layer._quantized_values):
        if isinstance(stored, tuple):
            data, meta = stored
            total += data.nbytes + sum(meta[k].nbytes for k in ("scale", "zero") if torch.is_tensor(meta.get(k)))
        else:
            packed = getattr(stored._data, "_data", stored._data)
            total += packed.nbytes + stored._scale.nbytes + stored._shift.nbytes
    return total


def prompt_cache(model, tokenizer, context: int) -> tuple[DynamicCache, torch.Tensor]:
    """Keys and values of a real prompt of ``context`` tokens, and the next token."""
    ids = tokenizer(builtin_text("evaluation"), return_tensors="pt", add_special_tokens=False).input_ids[:, :context]
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        for part in ids.split(1024, dim=1):
            hidden = model.base_model(part, past_key_values=cache, use_cache=True).last_hidden_state
        return cache, model.lm_head(hidden[:, -1:]).argmax(-1)


def run(model, tokenizer, context: int, names: list[str], artefacts, turns: int, tokens: int) -> list[dict]:
    source, first = prompt_cache(model, tokenizer, context - turns * tokens - tokens)
    methods = [Method(name, model, artefacts) for name in names]
    for method in methods:
        method.fill(source)
        method.turn(tokens, first)
    for _ in range(turns):
        for method in methods:
            method.speeds.append(method.turn(tokens, first))
    plain = next(m for m in methods if m.name == "DynamicCache")
    native = [m for m in methods if m.name in NATIVE]
    rows = []
    for method in methods:
        best = [max(n.speeds[i] for n in native) for i in range(turns)] if native else None
        rows.append(
            {
                "context": context,
                "method": method.name,
                "tokens_per_s": statistics.median(method.speeds),
                "tokens_per_s_range": [min(method.speeds), max(method.speeds)],
                "vs_dynamic": statistics.median(a / b for a, b in zip(method.speeds, plain.speeds)),
                "vs_best_native": statistics.median(a / b for a, b in zip(method.speeds, best)) if best else None,
                "cache_bytes": method.peak,
                "bytes_vs_dynamic": method.peak / plain.peak,
                "bytes_off_prediction": method.off if method.plan else None,
                "implementation": implementations(method.cache) if method.plan else None,
            }
        )
    return rows


def made_up(model, name: str) -> dict[str, torch.Tensor]:
    """Artefacts that calibration would make: speed and bytes do not depend on their numbers."""
    found = stand_in_artefacts(load_recipe(name), describe(model.config))
    for what, own in found.items():
        if own.ndim > 1 and own.shape[-1] == own.shape[-2]:
            # A matrix of a transform must have an inverse.
            found[what] = torch.eye(own.shape[-1], dtype=own.dtype).expand(own.shape).clone()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--native", nargs="*", default=list(NATIVE), choices=list(NATIVE))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=8, help="tokens decoded per turn")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    attention.register()
    folder = resolve_model(args.model)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype)).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = []
    for context in args.contexts:
        names = ["DynamicCache", *args.recipes, *args.native]
        rows += run(model, tokenizer, context, names, {}, args.turns, args.tokens)
        for row in rows[-len(names) :]:
            native = f"{row['vs_best_native']:.2f}x" if row["vs_best_native"] else "-"
            off = f"{row['bytes_off_prediction']:.1%}" if row["bytes_off_prediction"] is not None else "-"
            print(
                f"{context:6d} {row['method']:13s} {row['tokens_per_s']:7.2f} tok/s  {row['vs_dynamic']:.2f}x dynamic  "
                f"{native} best native  {row['cache_bytes'] / 2**20:7.1f} MiB ({row['bytes_vs_dynamic']:.3f})  "
                f"off prediction by {off}",
                flush=True,
            )
    if args.json:
        facts = {
            "model": args.model,
            "dtype": args.dtype,
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "turns": args.turns,
            "tokens_per_turn": args.tokens,
            "batch": 1,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"facts": facts, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
