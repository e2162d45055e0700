"""Judging a real engine's answers: those of the same cache pass, and each way of being another cache fails."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from kvq.errors import CheckpointError
from kvq.eval import engine_run as module
from kvq.eval.engine_run import ask_engine, compare_with_engine, logprobs
from kvq.exporting.exporter import export
from kvq.exporting.simulated_engine import simulated_config, simulated_plan
from kvq.models.resolve import load_model

PROMPTS = [list(range(3, 60)), list(range(40, 90))]


@pytest.fixture
def folder(tiny_checkpoint, tmp_path, monkeypatch, stats_of):
    source = tiny_checkpoint(layers=2, head_dim=32, heads=4, kv_heads=2)
    export(source, "fp8", tmp_path / "out", target="vllm", stats=stats_of(source))
    return tmp_path / "out"


@pytest.fixture
def engine(folder, monkeypatch):
    """Factory ``engine(plan=None, **changes)``: an engine that keeps the cache of ``plan``; changes to its answer."""

    def install(plan=None, **changes):
        plan = plan or simulated_plan(folder, "toward_zero")
        model = load_model(folder, dtype=torch.float32, config=simulated_config(folder))

        def output(prompt):
            made = list(prompt)
            for _ in range(4):
                made.append(int(logprobs(model, plan, made)[-1].argmax()))
            scores = logprobs(model, plan, made)[:-1].gather(1, torch.tensor(made[1:]).unsqueeze(1)).squeeze(1)
            cut = len(prompt) - 1
            return {
                "tokens": made[len(prompt) :],
                "text": "...",
                "prompt_logprobs": scores[:cut].tolist(),
                "logprobs": scores[cut:].tolist(),
            }

        held = {
            f"model.layers.{i}.self_attn.attn": {
                "key": [group.codecs["key"].scale], "value": [group.codecs["value"].scale], "cache_dtype": "fp8",
            }
            for i, (group,) in simulated_plan(folder).layers.items()
        }  # fmt: skip
        answer = {
            "version": "0.33.0", "platform": "cpu", "cache_dtype": "fp8", "layers": held,
            "outputs": [output(prompt) for prompt in PROMPTS],
        }  # fmt: skip
        monkeypatch.setattr(module, "ask_engine", lambda *args, **kwargs: answer | changes)

    return install


def problems(folder):
    return compare_with_engine(folder, PROMPTS, dtype="float32").problems


def rescaled(plan, factor, rounding="toward_zero"):
    layers = {
        index: tuple(
            dataclasses.replace(
                group,
                codecs={
                    side: dataclasses.replace(codec, scale=codec.scale * factor, rounding=rounding)
                    for side, codec in group.codecs.items()
                },
            )
            for group in groups
        )
        for index, groups in plan.layers.items()
    }
    return dataclasses.replace(plan, layers=layers)


def test_the_same_cache_passes(folder, engine):
    engine()
    found = compare_with_engine(folder, PROMPTS, dtype="float32")
    assert found.problems == ()
    assert found.scales_checked == 4
    assert found.rounding == "toward_zero"
    assert all(row.deviation <= module.FLOOR < row.effect for row in found.prompts)


@pytest.mark.parametrize("factor", [1 / 50, 1.3, 50.0])
def test_another_scale_in_the_kernels_is_seen(folder, engine, factor):
    """The engine names the right scales and computes with others."""
    engine(rescaled(simulated_plan(folder), factor))
    assert any("engine and simulation differ" in text for text in problems(folder))


def test_no_quantization_is_seen(folder, engine):
    engine(dataclasses.replace(simulated_plan(folder), layers={}))
    assert any("engine and simulation differ" in text for text in problems(folder))


def test_another_rounding_is_seen(folder, engine):
    engine(simulated_plan(folder, "nearest"))
    assert any("engine and simulation differ" in text for text in problems(folder))


def test_scales_that_did_not_arrive(folder, engine):
    layer = {"key": [1.0], "value": [1.0], "cache_dtype": "fp8"}
    engine(layers={f"model.layers.{i}.self_attn.attn": layer for i in range(2)})
    assert sum("has the key scale [1.0]" in text for text in problems(folder)) == 2


def test_a_cache_of_another_dtype(folder, engine):
    engine()
    answer = module.ask_engine(folder, PROMPTS)
    for layer in answer["layers"].values():
        layer["cache_dtype"] = "auto"
    assert problems(folder)[0] == "layers [0, 1] are not stored in FP8."


def test_tokens_that_nobody_would_choose(folder, engine):
    engine()
    output = module.ask_engine(folder, PROMPTS)["outputs"][0]
    output["tokens"] = [(token + 1) % 100 for token in output["tokens"]]
    assert any("nats below" in text for text in problems(folder))


class TestAsking:
    """The worker runs in the engine's own environment."""

    @pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed here")
    def test_an_environment_without_the_engine(self, folder):
        with pytest.raises(CheckpointError, match=r"vllm does not serve 'out'.*No module named 'vllm'"):
            ask_engine(folder, PROMPTS, python=sys.executable)

    def test_an_interpreter_that_is_not_there(self, folder):
        with pytest.raises(CheckpointError, match="cannot be run"):
            ask_engine(folder, PROMPTS, python="./no-such-python")

    def test_an_engine_that_does_not_answer(self, folder):
        with pytest.raises(CheckpointError, match="did not answer within 0 seconds"):
            ask_engine(folder, PROMPTS, timeout=0.01)

    def test_only_vllm_is_started(self, folder):
        with pytest.raises(CheckpointError, match="it runs vllm"):
            ask_engine(folder, PROMPTS, engine="sglang")

    def test_the_worker_needs_nothing_of_kvq(self):
        source = (Path(module.__file__).parent / "vllm_worker.py").read_text()
        assert "import kvq" not in source
        assert "from kvq" not in source
