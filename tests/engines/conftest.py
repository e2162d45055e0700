"""A real serving engine: exports of the embedded model that it serves, and a record of what was measured.

``make test-vllm`` sets KVQ_VLLM_PYTHON; without it everything here is skipped. What the tests measure is written to
``benchmarks/results/vllm.json`` and ``vllm.md`` until one fails; both say which ran.
"""

import json
import os
import platform
from pathlib import Path

import pytest
import torch

from kvq.calib.collect import collect
from kvq.calib.data import builtin_text
from kvq.calib.needs import DEFAULT_NEEDS
from kvq.eval.engine_run import ask_engine, two_prompts
from kvq.eval.result import installed_versions
from kvq.exporting.exporter import export
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
        needs = DEFAULT_NEEDS | {"reservoir"}
        return collect(load_model(folder), windows, weights_fingerprint=weights_fingerprint(folder), needs=needs)

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
    """Factory ``answers(target, dtype, recipe="fp8") -> (folder, prompts, answer)``: vLLM's, asked once for each."""
    kept: dict[tuple, tuple] = {}

    def ask(target: str, dtype: str, recipe: str | Recipe = "fp8") -> tuple:
        key = target, dtype, load_recipe(recipe).hash
        if key not in kept:
            folder = served(target, recipe)
            prompts = two_prompts(folder)
            answer = ask_engine(folder, prompts, python=engine_python, dtype=dtype, tokens=24)
            kept[key] = folder, prompts, answer
        return kept[key]

    return ask


@pytest.fixture(scope="session")
def record():
    """``record[name] = plain data``: what a test measured."""
    return {}


_passed: list[str] = []


def pytest_runtest_logreport(report):
    if report.when == "call" and report.passed and "engines/" in report.nodeid:
        _passed.append(report.nodeid.rpartition("::")[2])


@pytest.fixture(autouse=True)
def _write_results(request, record):
    """After every test: engines start slowly, and a session that is interrupted has measured something too."""
    yield
    if not record or request.session.testsfailed:
        return
    earlier = _earlier(request)
    data = {
        "what": "FP8 KV scales in vLLM on the CPU, compared with kvq's simulation of the same folder",
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count()},
        "versions": installed_versions(),
        "tests passed": sorted({*_passed, *earlier.get("tests passed", ())}),
        "results": earlier.get("results", {}) | record,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "vllm.json").write_text(json.dumps(data, indent=2) + "\n")
    (RESULTS / "vllm.md").write_text(_page(data))


def _earlier(request) -> dict:
    """The record of other tests of the same versions, if this session runs only some."""
    everything = len(list(request.config.args)) == 1 and "::" not in request.config.args[0]
    try:
        found = json.loads((RESULTS / "vllm.json").read_text())
    except (OSError, ValueError):
        return {}
    return {} if everything or found.get("versions") != installed_versions() else found


def _page(data: dict) -> str:
    """The record as a page: a table of comparisons, and everything else as it is."""
    compared = {name: row for name, row in data["results"].items() if isinstance(row, dict) and "prompts" in row}
    lines = [
        f"# {data['what']}",
        "",
        "Written by `make test-vllm`. Differences of log-probabilities in nats a token, of two prompts: *deviation*",
        "of the engine from the simulation of the same folder, *noise* of two simulations in different precision from",
        "each other, *effect* of the engine's cache on the answers of the model in 16 bits.",
        "",
        "| run | engine | cache | scales compared | deviation | noise | effect |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for name, row in compared.items():
        cells = [name, f"{row['engine']} {row['version']}", row["cache_dtype"], str(row["scales_checked"])]
        for field in ("deviation", "noise", "effect"):
            cells.append(", ".join(f"{prompt[field]:.4f}" for prompt in row["prompts"]))
        lines.append(f"| {' | '.join(cells)} |")
    for name, row in data["results"].items():
        if name not in compared:
            lines += ["", f"**{name}**", "", "```json", json.dumps(row, indent=2), "```"]
    machine = ", ".join(f"{key} {value}" for key, value in (data["hardware"] | data["versions"]).items())
    tests = "".join(f"\n- {name}" for name in data["tests passed"])
    return "\n".join([*lines, "", f"Measured with {machine}.", "", f"Tests that ran and passed:\n{tests}", ""])
