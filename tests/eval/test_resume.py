"""An evaluation that is killed and given again ends with the same result; recipes never read each other's answers."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from kvq.errors import DataError, RecipeError
from kvq.eval import continuations, greedy, likelihood
from kvq.eval import evaluation_run as run_module
from kvq.eval import results_cache as answers_module
from kvq.eval import text_tasks as text_module
from kvq.eval.evaluate import compare, evaluate
from kvq.exporting.exporter import export
from kvq.recipe import load_recipe

TEXT = "The quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs!\n" * 40
SETTINGS = {"seq_len": 200, "limit": 3, "lengths": (600,)}
TASKS = ("perplexity", "divergence", "needle", "drift")


@pytest.fixture
def text_file(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture
def folder(tiny_checkpoint):
    return tiny_checkpoint(heads=2, kv_heads=1, head_dim=32)


def plain(result):
    return json.dumps(result.to_dict(), sort_keys=True, default=str)


def stopped_by(number, folder, text_file, cache, out):
    """``kvq eval`` in a process of its own, which gets a signal when it has kept some answers: its exit code."""
    arguments = [sys.executable, "-m", "kvq.cli", "eval", str(folder), "--recipe", "int4", "--data", str(text_file)]
    arguments += ["--tasks", ",".join(TASKS), "--seq-len", "200", "--limit", "3", "--lengths", "600"]
    arguments += ["--cache", str(cache), "--json", str(out)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    # Two windows: what is kept may not yet be counted.
    while kept_windows(cache) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    return process.wait()


def kept_windows(cache):
    """Windows of the text in the folder for answers."""
    found = 0
    for file in cache.glob("*.sqlite"):
        try:
            with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as base:
                found += base.execute("SELECT COUNT(*) FROM answers WHERE item LIKE 'window:%'").fetchone()[0]
        except sqlite3.DatabaseError:
            # It is being made.
            continue
    return found


@pytest.mark.long
def test_an_interrupted_process_leaves_valid_results_marked_partial(folder, text_file, tmp_path):
    out = tmp_path / "out.json"
    assert stopped_by(signal.SIGINT, folder, text_file, tmp_path / "cache", out) == 130
    found = json.loads(out.read_text())
    assert found["partial"]
    assert found["windows"] >= 1
    assert found["unfinished"]
    assert found["results"]["perplexity"]["windows"] == found["windows"]


@pytest.mark.long
def test_a_killed_run_that_is_given_again_gives_the_same_json(folder, text_file, tmp_path):
    cache, out = tmp_path / "cache", tmp_path / "out.json"
    assert stopped_by(signal.SIGKILL, folder, text_file, cache, out) == -signal.SIGKILL
    assert not out.exists()
    settings = {**SETTINGS, "tasks": TASKS, "data": text_file}
    resumed = evaluate(folder, "int4", cache=cache, **settings)
    whole = evaluate(folder, "int4", cache=None, **settings)
    assert plain(resumed) == plain(whole)
    assert not resumed.partial


@pytest.mark.parametrize("steps", [2, 7])
def test_wherever_it_stops_it_goes_on(folder, text_file, tmp_path, steps):
    """Killed without warning at some transaction: the exception is none that the run handles."""
    settings = {**SETTINGS, "tasks": TASKS, "data": text_file}
    whole = evaluate(folder, "kivi2", cache=None, **settings)
    calls = []

    class Killed(BaseException):
        pass

    put = answers_module.Answers.put

    def stopping(self, pairs):
        put(self, pairs)
        calls.append(1)
        if len(calls) == steps:
            raise Killed

    cache = tmp_path / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers_module.Answers, "put", stopping)
        with pytest.raises(Killed):
            evaluate(folder, "kivi2", cache=cache, **settings)
    assert plain(evaluate(folder, "kivi2", cache=cache, **settings)) == plain(whole)


def test_a_finished_run_computes_nothing_again(folder, text_file, tmp_path, monkeypatch):
    settings = {**SETTINGS, "tasks": TASKS, "data": text_file, "cache": tmp_path / "cache"}
    first = evaluate(folder, "int4", **settings)

    def never(*args, **kwargs):
        raise AssertionError("computed again")

    monkeypatch.setattr(text_module, "score_windows", never)
    monkeypatch.setattr(text_module, "layer_errors", never)
    monkeypatch.setattr(continuations, "_score", never)
    monkeypatch.setattr(greedy, "_decode", never)
    assert plain(evaluate(folder, "int4", **settings)) == plain(first)


@pytest.mark.parametrize("other", [{"mode": "prefill"}, {"recipe": "int8"}, {"recipe": "other sinks"}])
def test_one_recipe_never_reads_anothers_answers(folder, text_file, tmp_path, other):
    recipes = {"int8": "int8", "other sinks": load_recipe("int4").override({"tokens.sinks": 3})}
    second = recipes.get(other.get("recipe"), "int4")
    mode = other.get("mode", "stream")
    settings = {**SETTINGS, "tasks": TASKS, "data": text_file}
    cache = tmp_path / "cache"
    evaluate(folder, "int4", cache=cache, **settings)
    found = evaluate(folder, second, mode=mode, cache=cache, **settings)
    assert plain(found) == plain(evaluate(folder, second, mode=mode, cache=None, **settings))


def test_an_interrupt_keeps_finished_tasks_and_names_the_others(folder, text_file):
    def stop_at(task):
        def progress(done, total, what):
            if what.startswith(task):
                raise KeyboardInterrupt

        return progress

    settings = {**SETTINGS, "tasks": TASKS, "data": text_file}
    whole = evaluate(folder, "int4", **settings)
    partial = evaluate(folder, "int4", progress=stop_at("drift"), **settings)
    assert partial.partial
    assert list(partial.unfinished) == ["drift"]
    assert list(partial.results) == ["perplexity", "divergence", "needle"]
    assert all(partial.results[name] == whole.results[name] for name in partial.results)
    partial = evaluate(folder, "int4", progress=stop_at("needle, int4"), **settings)
    assert list(partial.unfinished) == ["needle", "drift"]


@pytest.mark.long
def test_a_comparison_runs_the_baseline_once_and_equals_single_runs(folder, text_file, monkeypatch):
    settings = {**SETTINGS, "tasks": TASKS, "data": text_file, "cache": None}
    seen = []
    asked = run_module.ask
    monkeypatch.setattr(
        run_module, "ask", lambda model, plan, *a, **k: seen.append(plan) or asked(model, plan, *a, **k)
    )
    together = compare([folder], ["int4", "kivi2", "fp16"], **settings)
    assert [plan.recipe.name if plan.layers else None for plan in seen] == [None, "int4", "kivi2"] * 2
    for recipe, found in zip(("int4", "kivi2", "fp16"), together):
        assert plain(found) == plain(evaluate(folder, recipe, **settings))
    assert together[2].results["divergence"].kl == 0
    assert {metric.verdict for metric in together[2].results["needle"].metrics.values()} == {"same"}


def test_exports_share_their_baseline(folder, text_file, tmp_path, monkeypatch):
    for recipe in ("int4", "kivi2"):
        export(folder, recipe, tmp_path / recipe)
    settings = {**SETTINGS, "tasks": TASKS, "data": text_file, "cache": None}
    models = []
    states = likelihood.hidden_states
    monkeypatch.setattr(
        likelihood, "hidden_states", lambda model, *given: models.append(model) or states(model, *given)
    )
    found = compare([tmp_path / "int4", tmp_path / "kivi2"], **settings)
    # A window is read by the baseline, and under both plans, on one model.
    assert len(models) == 3 * 3
    assert len({id(model) for model in models}) == 1
    for recipe, result in zip(("int4", "kivi2"), found):
        single = evaluate(tmp_path / recipe, **settings)
        assert result.results == single.results
        assert result.recipe["name"] == recipe


def test_models_of_other_weights_need_a_named_baseline(folder, tiny_checkpoint, tiny_model, text_file, tmp_path):
    export(folder, "int4", tmp_path / "int4")
    other = tiny_checkpoint(tiny_model(seed=5, heads=2, kv_heads=1, head_dim=32), name="other")
    export(other, "int4", tmp_path / "other-int4")
    settings = {**SETTINGS, "tasks": ("divergence",), "data": text_file}
    with pytest.raises(DataError, match="come from different models"):
        compare([tmp_path / "int4", tmp_path / "other-int4"], **settings)
    found = compare([tmp_path / "int4", tmp_path / "other-int4"], baseline=folder, **settings)
    assert found[0].results == evaluate(tmp_path / "int4", baseline=folder, **settings).results
    assert found[1].results["divergence"].kl > 10 * found[0].results["divergence"].kl
    assert {result.baseline for result in found} == {"tiny"}
    with pytest.raises(RecipeError, match="compared on one model"):
        compare([folder, other], ["int4"], **settings)
    with pytest.raises(DataError, match="nothing to compare"):
        compare([], **settings)
