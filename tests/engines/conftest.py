"""A real serving engine: exports of the embedded model that it serves, and a record of what was measured.

``make test-vllm`` sets KVQ_VLLM_PYTHON; without it everything here is skipped. What the tests measure is written to
``benchmarks/results/vllm.json`` when all of them have passed.
"""

import json
import os
import platform
from pathlib import Path

import pytest
import torch

from kvq.calib.collect import collect
from kvq.calib.data import builtin_text
from kvq.eval.engine import ask_engine, two_prompts
from kvq.eval.result import installed_versions
from kvq.export.exporter import export
from kvq.models.resolve import load_model, load_tokenizer, weights_fingerprint
from kvq.recipe import Recipe, load_recipe

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.fixture(scope="session")
def engine_python() -> str:
    python = os.environ.get("KVQ_VLLM_PYTHON")
    if not python:
        pytest.skip("KVQ_VLLM_PYTHON names no Python with vLLM: run make test-vllm")
    return python


@pytest.fixture(scope="session")
def measured_stats(engine_python):
    """Factory ``measured_stats(folder) -> Stats`` over 8 windows of 512 tokens of the builtin text."""

    def measure(folder: Path):
        tokenizer = load_tokenizer(folder)
        ids = tokenizer(builtin_text("calibration")[:60_000])["input_ids"][: 8 * 512]
        windows = torch.tensor(ids).view(8, 512)
        return collect(load_model(folder), windows, weights_fingerprint=weights_fingerprint(folder))

    return measure


@pytest.fixture(scope="session")
def builtin_stats(builtin_dir, measured_stats):
    return measured_stats(builtin_dir)


@pytest.fixture(scope="session")
def served(builtin_dir, builtin_stats, tmp_path_factory):
    """Factory ``served(target, recipe="fp8") -> Path``: an export of the embedded model, made once for each."""
    made: dict[tuple, Path] = {}
    root = tmp_path_factory.mktemp("served")

    def make(target: str, recipe: str | Recipe = "fp8") -> Path:
        key = (target, load_recipe(recipe).hash)
        if key not in made:
            made[key] = root / f"{target}-{len(made)}"
            export(builtin_dir, recipe, made[key], target=target, stats=builtin_stats)
        return made[key]

    return make


@pytest.fixture(scope="session")
def answers(served, engine_python):
    """Factory ``answers(target, dtype) -> (folder, prompts, answer)``: vLLM's, asked once for each."""
    kept: dict[tuple, tuple] = {}

    def ask(target: str, dtype: str) -> tuple:
        if (target, dtype) not in kept:
            folder = served(target)
            prompts = two_prompts(folder)
            answer = ask_engine(folder, prompts, python=engine_python, dtype=dtype, tokens=24)
            kept[target, dtype] = folder, prompts, answer
        return kept[target, dtype]

    return ask


@pytest.fixture(scope="session")
def record():
    """``record[name] = plain data``: what a test measured."""
    return {}


@pytest.fixture(scope="session", autouse=True)
def _write_results(request, record):
    yield
    if not record or request.session.testsfailed:
        return
    data = {
        "what": "FP8 KV scales in vLLM on the CPU, compared with kvq's simulation of the same folder",
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count()},
        "versions": installed_versions(),
        "results": record,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "vllm.json").write_text(json.dumps(data, indent=2) + "\n")
