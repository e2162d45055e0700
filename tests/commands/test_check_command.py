"""``kvq check`` and ``kvq export --target``: what people and machines see, and exit codes."""

import json

import pytest

from kvq.commands import check
from kvq.eval.engine_run import EngineComparison, PromptComparison


@pytest.fixture
def model(tiny_checkpoint):
    return tiny_checkpoint(head_dim=32)


@pytest.fixture
def folder(run, model, stats, tmp_path):
    out = tmp_path / "served"
    args = ("export", model, "--recipe", "fp8", "--stats", stats(model), "--target", "vllm", "-o", out)
    result = run(*args)
    assert result.exit_code == 0, result.output
    assert f"kvq check {out}" in result.stdout
    return out


def test_a_whole_folder_passes_and_says_how_to_serve_it(run, folder):
    result = run("check", folder)
    assert result.exit_code == 0
    assert f"vllm 0.33: vllm serve {folder}" in result.stdout
    assert "4 of 4" in result.stdout


def test_one_engine_lists_recipes_and_takes_a_release(run, folder):
    result = run("check", folder, "--engine", "vllm", "--engine-version", "0.32", "--json", "-")
    report = json.loads(result.stdout)
    assert report["passes"] is True
    (engine,) = report["engines"]
    assert (engine["engine"], engine["version"], engine["cache_dtype"]) == ("vllm", "0.32", "fp8")
    assert engine["recipes"]["kivi2"].startswith("no: ")
    assert "Recipes in vLLM 0.32" in result.stderr


def test_a_fault_ends_with_code_2_and_one_line(run, refuse, folder):
    (folder / "kv_scales.safetensors").unlink()
    refuse("check", folder, says=("fails for vllm", "'kv_scales.safetensors'", "is missing"))
    report = json.loads(run("check", folder, "--json", "-").stdout)
    assert report["passes"] is False
    assert all(not engine["passes"] for engine in report["engines"])


def test_a_strangers_model_passes_if_any_engine_loads_it(run, model):
    assert run("check", model).exit_code == 0


def test_bad_questions(refuse, folder, tmp_path):
    refuse("check", tmp_path / "none", says=("does not exist",))
    refuse("check", folder, "--engine", "vlm", says=("Did you mean 'vllm'",))
    refuse("check", folder, "--engine", "vllm", "--engine-version", "9.9", says=("vllm 9.9", "0.33"))
    refuse("check", folder, "--engine-version", "0.33", says=("--engine NAME",))
    refuse("check", folder, "--run", "--engine", "sglang", says=("vllm only",))


def test_a_run_needs_the_engine(refuse, folder, monkeypatch):
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: None)
    refuse("check", folder, "--run", says=("--engine-python",))


@pytest.mark.parametrize("problems", [(), ("layer 0 has the key scale [1.0] and the folder [0.1].",)])
def test_a_run_passes_or_fails_with_the_comparison(run, folder, monkeypatch, problems):
    asked = {}

    def compare(path, prompts, **settings):
        asked.update(settings, prompts=len(prompts))
        row = PromptComparison(text="abc", deviation=0.01, worst=0.1, noise=0.01, effect=0.2, greedy_gap=0.0)
        return EngineComparison(
            engine="vllm", version="0.33.0", platform="cpu", cache_dtype="fp8", rounding="toward_zero",
            scales_checked=4, prompts=(row, row), problems=problems,
        )  # fmt: skip

    monkeypatch.setattr("kvq.eval.engine_run.compare_with_engine", compare)
    result = run("check", folder, "--run", "--engine-python", "some/python", "--dtype", "float32", "--json", "-")
    assert result.exit_code == (2 if problems else 0)
    report = json.loads(result.stdout)
    assert report["passes"] is not bool(problems)
    assert report["run"]["prompts"][0]["deviation"] == 0.01
    assert asked == {"python": "some/python", "dtype": "float32", "cache_dtype": None, "skip": (), "prompts": 2}


@pytest.fixture
def own(run, model, stats, tmp_path):
    """A folder for an engine's own cache dtype: a value rotation in the weights, no scales."""
    (tmp_path / "rotated4.yaml").write_text(
        "name: rotated4\ntransforms: {value: [{kind: hadamard}]}\n"
        "key: {codec: affine, bits: 4, axis: token, group: head}\n"
        "value: {codec: affine, bits: 4, axis: token, group: head}\n"
    )
    out = tmp_path / "own"
    result = run("export", model, "--recipe", tmp_path / "rotated4.yaml", "--target", "vllm", "-o", out)
    assert result.exit_code == 0, result.output
    assert "values of layers 0 to 1: hadamard in the weights" in result.stdout
    return out


def test_an_engines_own_dtype(run, own):
    result = run("check", own)
    assert result.exit_code == 0
    assert f"vllm serve {own} --kv-cache-dtype int4_per_token_head" in result.stdout
    report = json.loads(run("inspect", own, "--json", "-").stdout)
    assert (report["kind"], report["recipe"]["name"], report["scales"]) == ("engine export", "rotated4", {})
    assert "recipe          fp16" in run("generate", own, "--prompt", "ab", "--max-new-tokens", 4).stdout


def test_an_engines_own_dtype_is_run_in_16_bits(run, own, monkeypatch):
    asked = {}

    def compare(path, prompts, **settings):
        asked.update(settings)
        row = PromptComparison(text="abc", deviation=0.01, worst=0.1, noise=0.01, effect=0.0, greedy_gap=0.0)
        return EngineComparison(
            engine="vllm", version="0.33.0", platform="cpu", cache_dtype="auto", rounding="toward_zero",
            scales_checked=0, prompts=(row, row), problems=(),
        )  # fmt: skip

    monkeypatch.setattr("kvq.eval.engine_run.compare_with_engine", compare)
    result = run("check", own, "--run", "--engine-python", "some/python")
    assert result.exit_code == 0, result.output
    assert asked["cache_dtype"] is None
    assert "int4_per_token_head makes of a number is vLLM's own" in result.stdout


def test_a_python_that_has_no_engine(refuse, folder, tmp_path):
    refuse("check", folder, "--run", "--engine-python", tmp_path / "nothing", says=("cannot be run",))


def test_targets_are_listed(run):
    result = run("export", "--list-targets")
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.splitlines()] == [
        "kvq", "plain", "vllm", "sglang", "compressed-tensors", "modelopt",
    ]  # fmt: skip


def test_what_a_target_cannot_take_is_refused(refuse, model, tmp_path):
    out = tmp_path / "out"
    refuse("export", model, "--recipe", "kivi2", "--target", "vllm", "-o", out, says=("'affine'", "--target kvq"))
    refuse("export", model, "--recipe", "fp8", "--target", "vllm", "-o", out, says=("--stats",))
    refuse("export", model, "--recipe", "fp8", "--target", "tgi", "-o", out, says=("'tgi'",))
    assert not out.exists()


def test_other_commands_read_what_the_engine_would(run, folder):
    """inspect, generate and eval take the folder with the FP8 cache that the engine keeps."""
    result = run("inspect", folder, "--json", "-")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["kind"] == "engine export"
    assert "recipe          fp8" in run("generate", folder, "--prompt", "ab", "--max-new-tokens", 4).stdout
    result = run("eval", folder, "--limit", 1, "--seq-len", 64, "--mode", "simulate", "--json", "-")
    assert json.loads(result.stdout)["recipe"]["name"] == "fp8"


def test_a_sound_folder_shows_no_error(run, folder, model, tmp_path):
    """Levels, exit code and help agree: what other engines refuse is a note, unless it is they that were asked."""
    own = tmp_path / "packed"
    assert run("export", model, "--recipe", "int4", "-o", own).exit_code == 0
    for sound in (own, folder, model):
        result = run("check", sound, "--json", "-")
        assert result.exit_code == 0, result.stderr
        levels = [f["level"] for engine in json.loads(result.stdout)["engines"] for f in engine["findings"]]
        assert "error" not in levels
    report = json.loads(run("check", own, "--json", "-").stdout)
    loads = {engine["engine"]: engine["passes"] for engine in report["engines"]}
    assert loads == {"transformers": True, "vllm": False, "sglang": False}
    assert run("check", own, "--engine", "vllm").exit_code == 2
    assert "error" in run("check", own, "--engine", "vllm").output
