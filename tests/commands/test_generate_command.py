"""``kvq generate``."""

import json

import pytest


@pytest.fixture
def report(run):
    def invoke(*args, input=None):
        result = run("generate", *args, "--json", "-", input=input)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    return invoke


def test_an_export_generates_through_its_packed_cache(report, exported):
    result = report(exported("kivi2"), "--prompt", "a" * 300, "--raw", "--max-new-tokens", 8, "--ignore-eos")
    assert (result["prompt_tokens"], result["new_tokens"]) == (300, 8)
    assert result["cache"]["recipe"] == "kivi2"
    assert result["cache"]["tokens"] == 307
    assert result["cache"]["bytes_in_16_bit"] < result["cache"]["fp16_bytes"]
    assert result["tokens_per_second"] > 0


def test_a_plain_model_takes_a_recipe(report, tiny_checkpoint):
    model = tiny_checkpoint(head_dim=32)
    plain = report(model, "--prompt", "hello", "--max-new-tokens", 8)
    exact = report(model, "--prompt", "hello", "--max-new-tokens", 8, "--recipe", "fp16")
    packed = report(model, "--prompt", "hello", "--max-new-tokens", 8, "--recipe", "kivi4", "--set", "key.bits=8")
    assert plain["text"] == exact["text"]
    assert plain["cache"]["recipe"] == exact["cache"]["recipe"] == "fp16"
    assert packed["cache"]["recipe"] == "kivi4+key.bits=8"
    assert "kvq attention" in packed["cache"]["implementation"]


def test_the_text_is_printed_once_and_as_reported(run, tiny_checkpoint, tmp_path):
    file = tmp_path / "out.json"
    args = ("--max-new-tokens", 8, "--ignore-eos", "--json", file)
    result = run("generate", tiny_checkpoint(), *args, input="from stdin")
    text = json.loads(file.read_text())["text"]
    assert result.stdout.startswith(text + "\n")
    assert result.stdout.count("tokens/s") == 1


def test_the_chat_template_is_used_unless_raw(report, tiny_checkpoint):
    model = tiny_checkpoint()
    chat = report(model, "--prompt", "hi", "--max-new-tokens", 2)
    raw = report(model, "--prompt", "hi", "--max-new-tokens", 2, "--raw")
    assert raw["prompt_tokens"] == 2
    assert chat["prompt_tokens"] > 2


def test_sampling_follows_the_seed(report, tiny_checkpoint):
    model = tiny_checkpoint()
    args = ("--prompt", "hi", "--max-new-tokens", 12, "--ignore-eos", "--temperature", 2.0, "--seed")
    first, again, other = (report(model, *args, seed)["text"] for seed in (1, 1, 2))
    assert first == again != other


def test_bad_requests_are_refused(refuse, exported, tiny_checkpoint):
    model = tiny_checkpoint(max_length=64, name="short")
    refuse("generate", model, "--prompt", "a" * 60, "--raw", says=("60 tokens", "64 positions"))
    refuse("generate", model, says=("prompt is empty",), input="")
    refuse("generate", model, "--prompt", "x", "--set", "key.bits=4", says=("--recipe",))
    refuse("generate", model, "--prompt", "x", "--recipe", "fp8", says=("--stats",))
    refuse("generate", "./none", "--prompt", "x", says=("'./none'",))
    refuse("generate", exported(), "--prompt", "x", "--recipe", "kivi4", says=("brings its own recipe",))
