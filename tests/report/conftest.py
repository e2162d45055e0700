"""Results as evaluations give them, made by hand: reports are drawn without a model."""

import json

import pytest

from kvq.eval.paired import flips, share_difference
from kvq.eval.result import (
    Cell,
    DivergenceResult,
    EvalResult,
    LayerRow,
    MetricResult,
    PerplexityResult,
    PositionRow,
    SpeedResult,
    TaskResult,
    WorstToken,
)
from kvq.recipe import load_recipe

LENGTHS, DEPTHS = (1024, 2048), (0.0, 0.5, 1.0)


def divergence(kl: float) -> DivergenceResult:
    positions = [
        PositionRow(first=1, last=63, tokens=252, cached=0.0, kl=0.0, kl_stderr=0.0, top1=1.0),
        PositionRow(first=64, last=127, tokens=256, cached=0.5, kl=kl / 2, kl_stderr=kl / 20, top1=0.97),
        PositionRow(first=128, last=255, tokens=512, cached=1.0, kl=kl, kl_stderr=kl / 10, top1=0.95),
    ]
    return DivergenceResult(
        kl=kl,
        kl_stderr=kl / 10,
        kl_p99=20 * kl,
        kl_max=50 * kl,
        reverse_kl=1.1 * kl,
        reverse_kl_stderr=kl / 9,
        top1=1 - kl,
        top1_stderr=0.004,
        top5=1 - kl / 8,
        top5_stderr=0.001,
        windows=4,
        tokens=1020,
        worst=WorstToken(window=1, position=77, kl=50 * kl, before="he said <b>", token=' & "quit"'),
        positions=positions,
        layers=[LayerRow(layer=i, error=kl * (1 + i / 10), heads=[kl, 2 * kl, kl / 2]) for i in range(30)],
    )


def perplexity(delta: float) -> PerplexityResult:
    return PerplexityResult(
        value=20.0 + delta,
        baseline=20.0,
        delta_nll=delta / 20,
        delta_nll_stderr=0.001,
        low=delta / 20 - 0.003,
        high=delta / 20 + 0.003,
        verdict="worse" if delta > 0.1 else "too few samples to tell",
        windows=4,
        tokens=1020,
    )


def share_metric(right: list[bool], base: list[bool]) -> MetricResult:
    share = lambda values: sum(values) / len(values)  # noqa: E731
    return MetricResult.of(
        share(right), share(base), share_difference(right, base), higher_is_better=True, stderr=0.05,
        baseline_stderr=0.05, flips=flips(right, base),
    )  # fmt: skip


def task(right: list[bool], base: list[bool], metric: str = "acc", **more) -> TaskResult:
    facts = {"kind": "likelihood", "mode": "stream", "samples": len(right), "task_version": "1", "packed_share": 0.8}
    return TaskResult(metrics={metric: share_metric(right, base)}, **{**facts, **more})


def needle(found: float) -> TaskResult:
    cells = [
        Cell(
            labels={"length": length, "depth": depth},
            questions=4,
            metrics={"choice": (found if depth < 1 else 1.0, 1.0)},
        )
        for length in LENGTHS
        for depth in DEPTHS
    ]
    right = [i % 10 < 10 * found for i in range(40)]
    return task(right, [True] * 40, "choice", chance=0.2, cells=cells)


@pytest.fixture
def make_result():
    """``make_result(recipe, kl, results=None, **fields) -> dict``: the plain data of one evaluation."""

    def make(name: str = "kivi2", kl: float = 0.05, results=None, **fields) -> dict:
        recipe = load_recipe(name)
        if results is None:
            base = [i % 3 > 0 for i in range(60)]
            results = {
                "perplexity": perplexity(20 * kl),
                "divergence": divergence(kl),
                "needle": needle(max(0.0, 1 - 5 * kl)),
                "arc_easy": task([b and i % 7 > 0 for i, b in enumerate(base)], base),
                "piqa": task(base, base),
                "gsm8k": task(base[:10], base[:10], "exact_match,strict-match", kind="generation"),
                "speed": SpeedResult(
                    context=2048, tokens_per_second=40.0, baseline=50.0, ratio=0.8, ratio_low=0.75, ratio_high=0.9,
                    turns=5, threads=1, implementation="cpp (tensors are on the CPU)",
                ),
            }  # fmt: skip
        bits = {"fp16": 16.0, "int8": 8.2, "kivi4": 5.2, "kivi2": 3.3, "int4": 4.5, "int3": 3.4, "klt2": 2.9}.get(
            name, 4.4
        )
        memory = [
            {"tokens": n, "plain_bytes": n * 23040, "recipe_bytes": round(n * 23040 * bits / 16)}
            for n in (4096, 32768, 131072)
        ]
        found = EvalResult(
            **{
                "model": "tiny",
                "baseline": "the same weights, not quantized",
                "recipe": recipe.to_dict(),
                "recipe_hash": recipe.hash,
                "mode": "stream",
                "chunk": None,
                "bits_per_element": bits,
                "bits_tokens": 256,
                "asymptotic_bits": bits if name == "fp16" else bits - 0.2,
                "cache_dtype": "bfloat16",
                "results": results,
                "seq_len": 256,
                "stride": 256,
                "windows": 4,
                "tokens": 1020,
                "packed_share": 0.75,
                "data": {"source": "builtin", "sha256": "ab" * 32, "tokenizer_sha256": "cd" * 32, "tokens": 9000},
                "seed": 0,
                "dtype": "float32",
                "device": "cpu",
                "implementation": "two-view attention, torch reference",
                "partial": False,
                "memory": memory,
                "hashes": {"model": "1" * 64, "baseline": "1" * 64, "plan": name * 8, "code": "2" * 64},
                "command": f"kvq eval tiny --recipe {name}",
                "versions": {"python": "3.11", "torch": "2.13", "transformers": "5.23"},
                **fields,
            }
        )
        # As it is read from a file.
        return json.loads(json.dumps(found.to_dict()))

    return make
