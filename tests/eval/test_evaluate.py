import json
import math

import pytest
import torch

from kvq.calib.collect import collect
from kvq.errors import CheckpointError, DataError, ModelNotFoundError, RecipeError
from kvq.eval.evaluate import evaluate
from kvq.exporting.exporter import export

TEXT = "The quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs!\n" * 5


@pytest.fixture
def text_file(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture
def folder(tiny_checkpoint):
    return tiny_checkpoint(heads=2, kv_heads=1, head_dim=32)


def test_the_json_contract_and_the_provenance(folder, text_file):
    found = evaluate(folder, "int4", data=text_file, seq_len=64, limit=3, seed=5)
    result = json.loads(json.dumps(found.to_dict()))
    assert list(result)[:4] == ["schema_version", "mode", "bits_per_element", "results"]
    assert result["mode"] == "stream"
    assert result["results"]["perplexity"]["value"] != result["results"]["perplexity"]["baseline"]
    assert result["results"]["divergence"]["kl"] > 0
    assert 0 < result["results"]["divergence"]["top1"] <= 1
    assert result["recipe"]["name"] == "int4"
    assert len(result["recipe_hash"]) == len(result["data"]["sha256"]) == 64
    assert result["data"]["source"] == "text.txt"
    assert (result["windows"], result["tokens"], result["seq_len"], result["stride"]) == (3, 189, 64, 64)
    assert (result["seed"], result["partial"], result["dtype"]) == (5, False, "float32")
    assert result["schema_version"] == 2
    assert {len(value) for value in result["hashes"].values()} == {64}
    assert result["hashes"]["model"] == result["hashes"]["baseline"]
    assert [row["layer"] for row in result["results"]["divergence"]["layers"]] == [0, 1]
    assert result["memory"][0]["recipe_bytes"] < result["memory"][0]["plain_bytes"]
    # The first query of a window has nothing before it.
    assert result["packed_share"] == pytest.approx(62 / 63)
    # Pages are whole and the window keeps some spare room, which weighs on so short a text.
    assert 4 < result["bits_per_element"] < 32
    assert result["bits_tokens"] == 64
    assert {"kvq-toolkit", "torch", "transformers", "python"} <= result["versions"].keys()
    assert str(folder.parent) not in json.dumps(result)


def test_fp16_equals_the_plain_model(folder, text_file):
    result = evaluate(folder, data=text_file, seq_len=64).to_dict()
    assert result["recipe"]["name"] == "fp16"
    assert result["results"]["perplexity"]["value"] == result["results"]["perplexity"]["baseline"]
    assert result["results"]["divergence"]["kl"] == 0
    assert result["packed_share"] == 0
    quantized = evaluate(folder, "int4", data=text_file, seq_len=64).to_dict()
    baseline = quantized["results"]["perplexity"]["baseline"]
    assert baseline == pytest.approx(result["results"]["perplexity"]["value"], rel=1e-6)


def test_an_export_is_scored_as_its_base_model_with_the_recipe(folder, text_file, tmp_path):
    export(folder, "kivi2", tmp_path / "out")
    settings = {"data": text_file, "seq_len": 200, "limit": 2}
    exported = evaluate(tmp_path / "out", **settings)
    assert exported.results == evaluate(folder, "kivi2", **settings).results
    assert exported.recipe["name"] == "kivi2"
    assert exported.results["divergence"].kl > 0
    with pytest.raises(RecipeError, match="brings its own recipe"):
        evaluate(tmp_path / "out", "int4", **settings)


@pytest.mark.parametrize("mode", ["prefill", "chunked", "simulate"])
def test_modes_differ(folder, text_file, mode):
    settings = {"data": text_file, "seq_len": 210, "chunk": 30}
    stream, other = (evaluate(folder, "kivi2", mode=m, **settings) for m in ("stream", mode))
    assert other.mode == mode
    assert other.chunk == (30 if mode == "chunked" else None)
    if mode == "simulate":
        assert other.packed_share == 1
        assert other.results["divergence"].kl > stream.results["divergence"].kl
    else:
        assert 0 < other.packed_share < 1
        assert 0 < other.results["divergence"].kl != stream.results["divergence"].kl


@pytest.mark.parametrize("mode", ["stream", "prefill", "chunked"])
def test_a_text_that_reads_nothing_quantized_gets_no_number(folder, text_file, mode):
    """101 tokens never fill KIVI's exact window of 128: such a perplexity would be the unquantized model's."""
    with pytest.raises(DataError, match="no scored token of windows of 101 tokens"):
        evaluate(folder, "kivi2", data=text_file, seq_len=101, mode=mode)
    assert evaluate(folder, "kivi2", data=text_file, seq_len=101, mode="simulate").packed_share == 1
    # What quantizes nothing may be scored at any length.
    assert evaluate(folder, "fp16", data=text_file, seq_len=101, mode=mode).packed_share == 0


def test_another_baseline(folder, tiny_checkpoint, tiny_model, text_file):
    other = tiny_checkpoint(tiny_model(seed=4), name="other")
    result = evaluate(folder, "int4", data=text_file, seq_len=64, limit=2, baseline=other)
    plain = evaluate(other, data=text_file, seq_len=64, limit=2)
    assert result.baseline == "other"
    assert result.results["perplexity"].baseline == pytest.approx(plain.results["perplexity"].value, rel=1e-6)


def test_jsonl_text_and_static_scales(folder, tmp_path, tiny_model):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in TEXT.splitlines()))
    with pytest.raises(RecipeError, match="needs statistics"):
        evaluate(folder, "fp8", data=file, seq_len=64)
    windows = torch.randint(3, 100, (2, 64), generator=torch.Generator().manual_seed(0))
    stats = collect(tiny_model(heads=2, kv_heads=1, head_dim=32), windows)
    result = evaluate(folder, "fp8", data=file, seq_len=64, stats=stats)
    assert 0 < result.results["divergence"].kl < 1
    other = collect(tiny_model(), windows)
    with pytest.raises(CheckpointError, match="another shape"):
        evaluate(folder, "fp8", data=file, seq_len=64, stats=other)


def test_an_interrupt_keeps_finished_windows(folder, text_file):
    def stop_after(count):
        def progress(done, total, what):
            if done == count and what == "text":
                raise KeyboardInterrupt

        return progress

    settings = {"data": text_file, "seq_len": 64}
    partial = evaluate(folder, "int4", progress=stop_after(2), **settings)
    assert partial.partial
    assert partial.windows == 2
    whole = evaluate(folder, "int4", limit=2, **settings)
    assert not whole.partial
    assert partial.results == whole.results
    with pytest.raises(KeyboardInterrupt):
        evaluate(folder, "int4", progress=stop_after(0), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "steam"}, "Did you mean 'stream'"),
        ({"tasks": ()}, "not a list of tasks"),
        ({"tasks": "perplexity"}, "not a list of tasks"),
        ({"seq_len": 5000}, "at most 4096"),
        ({"seq_len": 1}, "leaves nothing to score"),
        ({"seq_len": 4000}, "has 430 tokens"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"limit": 0}, "limit=0"),
    ],
)
def test_bad_settings_are_one_sentence(folder, text_file, settings, message):
    with pytest.raises(DataError, match=message) as caught:
        evaluate(folder, "int4", **({"data": text_file} | settings))
    assert "\n" not in str(caught.value)


def test_unknown_things_are_named(folder, text_file, tmp_path):
    with pytest.raises(ModelNotFoundError, match="absent"):
        evaluate(folder, "int4", data=tmp_path / "absent.txt")
    with pytest.raises(RecipeError, match="Did you mean 'kivi2'"):
        evaluate(folder, "kivi22", data=text_file)


def test_a_task_without_lm_eval_says_what_to_install(folder, text_file, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.tasks", None)
    with pytest.raises(DataError, match=r"kvq-toolkit\[eval\]"):
        evaluate(folder, "int4", tasks=("arc_easy",), data=text_file)


def test_broken_weights_are_named(tiny_model, tiny_checkpoint, text_file):
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    with pytest.raises(DataError, match="NaN or infinite"):
        evaluate(tiny_checkpoint(model), "int4", data=text_file, seq_len=64)
