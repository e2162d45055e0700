"""``kvq eval``."""

import json
import math

import pytest

from kvq.eval import text_tasks as text_module

SIZES = ("--seq-len", 256, "--limit", 2)


@pytest.fixture
def report(run):
    def invoke(*args):
        result = run("eval", *args, "--json", "-")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    return invoke


def test_the_contract_of_the_json(report, exported, text):
    result = report(exported("kivi2"), "--data", text, *SIZES)
    assert result["mode"] == "stream"
    assert 2.0 < result["bits_per_element"] < 16.0
    assert set(result["results"]["perplexity"]) >= {"value", "baseline"}
    assert set(result["results"]["divergence"]) >= {"kl", "top1"}
    assert result["results"]["divergence"]["kl"] > 0
    assert math.isfinite(result["results"]["perplexity"]["value"])


@pytest.mark.parametrize("mode", ["prefill", "chunked", "simulate"])
def test_every_mode_is_named_in_its_result(report, exported, text, mode):
    settings = ("--data", text, *SIZES, "--mode", mode, "--chunk", 64, "--tasks", "perplexity")
    result = report(exported("int4"), *settings)
    assert result["mode"] == mode
    assert list(result["results"]) == ["perplexity"]


def test_fp16_is_the_plain_model(report, tiny_checkpoint, text):
    results = report(tiny_checkpoint(head_dim=32), "--recipe", "fp16", "--data", text, *SIZES)["results"]
    assert results["perplexity"]["value"] == results["perplexity"]["baseline"]
    assert results["divergence"]["kl"] == 0


def test_set_changes_the_recipe(report, tiny_checkpoint, text):
    model = tiny_checkpoint(head_dim=32)
    args = ("--recipe", "kivi2", "--data", text, *SIZES)
    coarse = report(model, *args)
    fine = report(model, *args, "--set", "key.bits=8", "--set", "value.bits=8")
    assert fine["results"]["divergence"]["kl"] < coarse["results"]["divergence"]["kl"]
    assert fine["bits_per_element"] > coarse["bits_per_element"]


def test_the_table_shows_every_measure(run, exported, text):
    result = run("eval", exported("kivi2"), "--data", text, *SIZES)
    assert result.exit_code == 0
    for word in ("perplexity", "kl", "bits at 256", "top1", "mode stream"):
        assert word in result.stdout


def test_windows_that_fit_in_the_exact_window_are_refused(refuse, exported, text):
    refuse("eval", exported("kivi2"), "--data", text, "--seq-len", 64, "--limit", 1, says=("kivi2", "--seq-len"))


def test_an_interrupted_run_shows_what_it_has_and_exits_130(run, exported, text, monkeypatch):
    scores, calls = text_module.score_windows, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return scores(*args, **kwargs)

    monkeypatch.setattr(text_module, "score_windows", interrupted)
    result = run("eval", exported("kivi2"), "--data", text, *SIZES, "--json", "-", "--no-cache")
    assert result.exit_code == 130
    found = json.loads(result.stdout)
    assert found["partial"] is True
    assert found["windows"] == 1
    assert result.stderr.strip().endswith("Interrupted.")


@pytest.mark.long
def test_bad_requests_are_refused(refuse, exported, tiny_checkpoint, text, tmp_path):
    model = tiny_checkpoint(head_dim=32, name="plain")
    refuse("eval", model, "--recipe", "kivi", says=("'kivi'", "Did you mean"))
    refuse("eval", model, "--recipe", "fp8", "--data", text, says=("--stats",))
    refuse("eval", model, "--tasks", "perplexty", says=("'perplexty'", "Did you mean 'perplexity'?"))
    refuse("eval", model, "--data", text, "--seq-len", 9999, says=("seq_len=9999", "4096"))
    refuse("eval", model, "--data", text, "--seq-len", 64, "--stride", 65, says=("stride=65",))
    refuse("eval", model, "--data", tmp_path / "none.txt", says=("none.txt",))
    refuse("eval", model, "--task-dir", tmp_path / "none", "--tasks", "my_task", says=("does not exist",))
    refuse("eval", "./none", says=("'./none'",))
    refuse("eval", exported(), "--data", text, "--baseline", "./none", says=("'./none'",))


def test_statistics_of_another_model_are_refused(refuse, tiny_checkpoint, stats, text):
    other = stats(tiny_checkpoint(name="other", layers=3, head_dim=32))
    model = tiny_checkpoint(head_dim=32)
    refuse("eval", model, "--recipe", "fp8", "--stats", other, "--data", text, says=("another shape",))


def test_truncated_weights_are_refused(refuse, exported, text):
    folder = exported("kivi2")
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(content[:-10])
    refuse("eval", folder, "--data", text, *SIZES, says=("'model.safetensors'", "truncated"))
    refuse("generate", folder, "--prompt", "x", says=("'model.safetensors'", "truncated"))
