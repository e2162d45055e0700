"""Exports served by vLLM on the CPU: its own scales, cache dtype, greedy text and log-probabilities.

Every number that the engine gives is compared with kvq's simulation of the same folder; how near they must come is what
two simulations of different precision differ by (``kvq.eval.engine_run``).
"""

import json
import math
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma3TextConfig

from kvq.errors import CheckpointError
from kvq.eval.engine_run import ask_engine, compare_with_engine, judge, logprobs, two_prompts
from kvq.exporting.check import check_folder
from kvq.exporting.engines import find_release
from kvq.exporting.exporter import export
from kvq.exporting.simulated_engine import simulated_config, simulated_plan
from kvq.models.resolve import load_model
from kvq.recipe import load_recipe

pytestmark = [pytest.mark.engine, pytest.mark.model]

SCALES, INDEX = "kv_scales.safetensors", "model.safetensors.index.json"
QOQ = load_recipe("qoq4")
# The same transforms with an FP8 cache behind them.
QOQ_FP8 = load_recipe("fp8").override(
    {f"transforms.{side}": QOQ.transforms.to_dict()[side] for side in ("key", "value")}
)


def without_scales(folder: Path, out: Path) -> Path:
    """The same folder as if a tool had declared FP8 and written no scales."""
    shutil.copytree(folder, out, copy_function=shutil.copy)
    (out / SCALES).unlink()
    shutil.rmtree(out / "kvq")
    index = json.loads((out / INDEX).read_text())
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if f != SCALES}
    (out / INDEX).write_text(json.dumps(index))
    return out


def perplexity(output) -> float:
    found = output["prompt_logprobs"]
    return math.exp(-sum(found) / len(found))


def judged(answers, record, target, dtype):
    """Scales arrived number for number, the cache is FP8, and log-probabilities agree within FP8 noise."""
    folder, prompts, answer = answers(target, dtype)
    found = judge(folder, prompts, answer, dtype=dtype)
    record[f"{target}, {dtype}"] = found.to_dict()
    assert found.problems == ()
    assert found.cache_dtype.startswith("fp8")
    assert found.scales_checked == 60


# The runs that say most come first, so that an interrupted session has measured something.
def test_offline_answers_are_those_of_the_simulation(answers, record):
    judged(answers, record, "vllm", "float32")


def test_transforms_in_the_weights_with_fp8_scales_behind_them(answers, served, record):
    """Smoothed keys, rotated values: scales of what the folded weights compute, and the answers of its simulation."""
    folder, prompts, answer = answers("vllm", "float32", QOQ_FP8)
    found = judge(folder, prompts, answer, dtype="float32")
    record["qoq4's transforms in the weights, FP8, float32"] = found.to_dict()
    assert found.problems == ()
    assert found.scales_checked == 60
    # Not the scales of the plain model: its values were rotated.
    problems = judge(served("vllm"), prompts, answer, dtype="float32").problems
    assert any("has the value scale" in text for text in problems)


def test_greedy_text_is_the_simulations(answers, record):
    """Token by token, kvq's simulation would have written what the engine wrote."""
    folder, prompts, answer = answers("vllm", "float32")
    plan = simulated_plan(folder, "toward_zero")
    model = load_model(folder, dtype=torch.float32, config=simulated_config(folder))
    same = []
    for prompt, output in zip(prompts, answer["outputs"]):
        best = logprobs(model, plan, prompt + output["tokens"])[len(prompt) - 1 : -1]
        same += (best.argmax(-1) == torch.tensor(output["tokens"])).tolist()
        # Where they differ, both tokens are as likely as noise can tell.
        chosen = best.gather(1, torch.tensor(output["tokens"]).unsqueeze(1)).squeeze(1)
        assert (best.amax(-1) - chosen).max() < 0.25
    record["greedy text, float32"] = {
        "text": [output["text"] for output in answer["outputs"]],
        "tokens": len(same),
        "same as the simulation's": sum(same),
    }
    assert sum(same) >= len(same) - 2


def test_without_scales_the_engine_answers_otherwise_and_check_refuses(served, engine_python, record, tmp_path):
    """The control: vLLM loads it without a word, at scale 1.0, and does not answer as the calibrated cache would."""
    folder = served("vllm")
    stripped = without_scales(folder, tmp_path / "stripped")
    (report,) = check_folder(stripped, [find_release("vllm", "0.32")])
    assert any("have no scales: vLLM would use 1.0" in finding.text for finding in report.errors)
    prompts = two_prompts(folder)
    answer = ask_engine(stripped, prompts, python=engine_python, dtype="float32")
    assert {scale for layer in answer["layers"].values() for scale in layer["key"] + layer["value"]} == {1.0}
    found = judge(folder, prompts, answer, dtype="float32")
    record["without scales, float32"] = found.to_dict() | {"problems": len(found.problems)}
    assert any("engine and simulation differ" in text for text in found.problems)
    assert any("has the key scale [1.0]" in text for text in found.problems)


def test_large_keys_collapse_at_one_and_are_whole_with_scales(
    builtin_dir, large_keys, measured_stats, engine_python, record, tmp_path
):
    """vLLM issue 11906 in kind: keys 512 times as large, queries as much smaller, so the model itself is unchanged."""
    large = large_keys(builtin_dir, tmp_path / "large", 512.0)
    folder = tmp_path / "fp8"
    export(large, "fp8", folder, target="vllm", stats=measured_stats(large))
    prompts = two_prompts(folder)
    settings = {"python": engine_python, "dtype": "bfloat16", "tokens": 1}
    answers = {
        "16 bits": ask_engine(large, prompts, **settings),
        "FP8, kvq's scales": ask_engine(folder, prompts, **settings),
        "FP8, scale 1.0": ask_engine(large, prompts, cache_dtype="fp8", **settings),
    }
    found = {name: [perplexity(output) for output in answer["outputs"]] for name, answer in answers.items()}
    record["large keys, perplexity of two prompts"] = found
    for exact, calibrated, unit in zip(*found.values()):
        assert calibrated < 1.2 * exact
        assert unit > 5 * exact


def test_sliding_layers_are_stored_with_their_own_scales(engine_python, tiny_model, tiny_checkpoint, stats_of, record):
    """A tiny Gemma 3: windows and full layers alike hold the scales of the folder, and answer as simulated."""
    config = Gemma3TextConfig(
        num_hidden_layers=4, hidden_size=128, head_dim=64, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=128, vocab_size=128, sliding_window=32, max_position_embeddings=512,
        architectures=["Gemma3ForCausalLM"], layer_types=["sliding_attention"] * 3 + ["full_attention"],
        initializer_range=0.15,
    )  # fmt: skip
    source = tiny_checkpoint(tiny_model(config), name="gemma")
    export(source, "fp8", source.parent / "out", target="vllm", stats=stats_of(source))
    prompts = [list(range(3, 100)), list(range(100, 20, -1))]
    found = compare_with_engine(source.parent / "out", prompts, python=engine_python, dtype="float32")
    record["tiny Gemma 3, sliding and full layers, float32"] = found.to_dict()
    assert found.problems == ()
    assert found.scales_checked == 8


def test_layers_without_scales_stay_in_16_bits_with_the_flag(served, engine_python, record):
    """The serve command of a folder whose recipe keeps layers exact."""
    recipe = load_recipe("fp8").override({"layers.0-1.key.codec": "exact", "layers.0-1.value.codec": "exact"})
    folder = served("vllm", recipe)
    (report,) = check_folder(folder, [find_release("vllm", "0.32")])
    assert report.skip == ("0", "1")
    settings = {"python": engine_python, "dtype": "float32", "skip": report.skip}
    found = compare_with_engine(folder, two_prompts(folder), **settings)
    record["layers 0 and 1 in 16 bits, float32"] = found.to_dict()
    assert found.problems == ()
    assert found.scales_checked == 56


def test_one_scale_a_head_loads(served, engine_python, record):
    """The CPU kernels take the largest of a layer's; which they do is seen in the answers."""
    recipe = load_recipe("fp8").override({"key.granularity": "head", "value.granularity": "head"})
    folder = served("vllm", recipe)
    found = compare_with_engine(folder, two_prompts(folder), python=engine_python, dtype="float32")
    record["one scale a head, float32"] = found.to_dict()
    assert found.problems == ()


@contextmanager
def server(folder: Path, python: str, log: Path):
    """The OpenAI-compatible server of vLLM on a free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port),
        "--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "2",
        "--enforce-eager", "--no-enable-prefix-caching", "--served-model-name", "kvq",
    ]  # fmt: skip
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "PATH": "/usr/bin"}
    with open(log, "w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
        try:
            _wait(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(url: str, process, log: Path, seconds: float = 600) -> None:
    start = time.monotonic()
    while time.monotonic() - start < seconds:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(1)
    raise AssertionError(log.read_text()[-3000:])


def _complete(url: str, prompt: list[int], tokens: int) -> dict:
    body = {
        "model": "kvq", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "logprobs": 1,
        "prompt_logprobs": 0, "ignore_eos": True, "return_token_ids": True,
    }  # fmt: skip
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.load(answer)["choices"][0]


def test_the_openai_server_answers_as_the_simulation(answers, engine_python, record, tmp_path):
    """Over HTTP, one request at a time; scales and cache dtype are those that the offline engine held."""
    folder, prompts, offline = answers("vllm", "float32")
    log = tmp_path / "server.log"
    with server(folder, engine_python, log) as url:
        choices = [_complete(url, prompt, 16) for prompt in prompts]
    answer = offline | {"outputs": [_as_output(prompt, choice) for prompt, choice in zip(prompts, choices)]}
    found = judge(folder, prompts, answer, dtype="float32")
    record["OpenAI server, float32"] = found.to_dict()
    assert found.problems == ()


def _as_output(prompt: list[int], choice: dict) -> dict:
    given = [entry[str(token)]["logprob"] for token, entry in zip(prompt[1:], choice["prompt_logprobs"][1:])]
    return {
        "tokens": choice["token_ids"],
        "text": choice["text"],
        "prompt_logprobs": given,
        "logprobs": choice["logprobs"]["token_logprobs"],
    }


def test_scales_of_the_folder_are_what_kernels_use(served, engine_python, tmp_path):
    """Halved scales in the file change the answers, and follow into the simulation: nothing else carries them."""
    folder = tmp_path / "halved"
    shutil.copytree(served("vllm"), folder, copy_function=shutil.copy)
    shutil.rmtree(folder / "kvq")
    scales = load_file(folder / SCALES)
    save_file({name: scale / 2 for name, scale in scales.items()}, folder / SCALES, metadata={"format": "pt"})
    prompts = two_prompts(folder)
    answer = ask_engine(folder, prompts, python=engine_python, dtype="float32")
    assert judge(folder, prompts, answer, dtype="float32").problems == ()
    assert judge(served("vllm"), prompts, answer, dtype="float32").problems != ()


@pytest.mark.parametrize(("target", "dtype"), [("vllm", "bfloat16"), ("modelopt", "bfloat16")])
def test_offline_answers_in_16_bits_and_from_other_names(answers, record, target, dtype):
    judged(answers, record, target, dtype)


def test_a_folder_for_the_engines_own_cache_answers_as_the_base_model(answers, builtin_dir, engine_python, record):
    """qoq4 for int4_per_token_head, which vLLM's CPU backend lacks: in 16 bits its weights give the base's answers."""
    folder, prompts, answer = answers("vllm", "float32", QOQ)
    (report,) = check_folder(folder, [find_release("vllm", "0.32")])
    assert report.serve.endswith("--kv-cache-dtype int4_per_token_head")
    base = ask_engine(builtin_dir, prompts, python=engine_python, dtype="float32", tokens=24)
    found = judge(folder, prompts, answer, dtype="float32")
    gap = max(
        abs(a - b)
        for own, other in zip(answer["outputs"], base["outputs"])
        for a, b in zip(own["prompt_logprobs"], other["prompt_logprobs"], strict=True)
    )
    record["qoq4 in the weights, 16-bit cache, float32"] = found.to_dict() | {"largest difference from the base": gap}
    assert found.problems == ()
    # Folding rounds the weights to bfloat16 once more.
    assert gap < 0.5


@pytest.mark.parametrize("dtype", ["int8_per_token_head", "int4_per_token_head"])
def test_the_cpu_takes_cache_dtypes_that_it_lacks_and_answers_nonsense(answers, engine_python, record, dtype):
    """Nothing refuses them, so the condition that card and check state is the only warning."""
    folder, prompts, exact = answers("vllm", "float32", QOQ)
    (report,) = check_folder(folder, [find_release("vllm", "0.32")])
    assert any("CPU backend" in finding.text for finding in report.findings if finding.level == "warning")
    answer = ask_engine(folder, prompts, python=engine_python, dtype="float32", cache_dtype=dtype, tokens=1)
    runs = {"16 bits": exact, dtype: answer}
    found = {name: [perplexity(output) for output in run["outputs"]] for name, run in runs.items()}
    record[f"{dtype} on the CPU, perplexity of two prompts"] = found
    for right, wrong in zip(*found.values()):
        assert wrong > 100 * right


def test_a_missing_file_is_refused_by_the_engine(served, engine_python, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(served("vllm"), broken, copy_function=shutil.copy)
    (broken / "model-00001-of-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match="vllm does not serve 'broken'"):
        ask_engine(broken, two_prompts(broken), python=engine_python)
