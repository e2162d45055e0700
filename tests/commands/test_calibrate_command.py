"""``kvq calibrate``."""

import errno
import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig

import kvq
from kvq.calib.needs import ALL_NEEDS, DEFAULT_NEEDS
from kvq.calib.stats import LayerStats, Stats
from kvq.commands.calibrate import Bytes


def test_calibrate_writes_statistics_of_the_model(run, tiny_checkpoint, text, tmp_path):
    out = tmp_path / "stats.safetensors"
    args = ("--data", text, "--samples", 4, "--seq-len", 32, "--batch-size", 3, "--json", "-")
    result = run("calibrate", tiny_checkpoint(layers=3), "-o", out, *args)
    report = json.loads(result.stdout)
    assert (report["layers"], report["tokens"], report["data"]["source"]) == (3, 128, "text.txt")
    stats = Stats.load(out)
    assert sorted(stats.layers) == [0, 1, 2]
    assert stats.layers[0]["key.range"].count == 128
    assert "4 windows, 128 tokens" in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["stats.safetensors", "text.txt", "tiny"]


def test_calibrate_refuses_bad_data(refuse, tiny_checkpoint, text, tmp_path):
    model, out = tiny_checkpoint(), tmp_path / "stats.safetensors"
    refuse("calibrate", model, "-o", out, "--data", "none.txt", says=("'none.txt'", "does not exist"))
    refuse("calibrate", model, "-o", out, "--data", text, "--samples", 999, says=("samples=999", "8,"))
    # Offline, a hub data set cannot be fetched.
    refuse("calibrate", model, "-o", out, "--data", "owner/data", says=("'owner/data'",))
    assert not out.exists()


def test_calibrate_refuses_an_output_that_cannot_be_written_before_it_runs(refuse, tmp_path):
    refuse("calibrate", "./no-such-model", "-o", tmp_path / "no" / "stats", says=("does not exist", "folder"))
    refuse("calibrate", "./no-such-model", "-o", tmp_path, says=("is a folder",))


def test_calibrate_refuses_activations_that_are_not_finite(refuse, tiny_checkpoint, tiny_model, text, tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.fill_(float("nan"))
    out = tmp_path / "stats.safetensors"
    args = ("-o", out, "--data", text, "--samples", 2, "--seq-len", 32)
    refuse("calibrate", tiny_checkpoint(model), *args, says=("layer 1", "NaN or Inf"))
    assert not out.exists()


def test_a_full_disk_leaves_nothing(refuse, tiny_checkpoint, text, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    model = tiny_checkpoint()
    monkeypatch.setattr("os.fsync", full)
    before = sorted(tmp_path.iterdir())
    args = ("-o", tmp_path / "stats.safetensors", "--data", text, "--samples", 2, "--seq-len", 32)
    refuse("calibrate", model, *args, says=("No space left on device",))
    assert sorted(tmp_path.iterdir()) == before


def calibrated(run, model, out, *args) -> Stats:
    result = run("calibrate", model, "-o", out, "--samples", 4, "--seq-len", 32, *args)
    assert result.exit_code == 0, result.output
    return Stats.load(out)


def test_full_default_and_for_a_recipe(run, refuse, tiny_checkpoint, text, tmp_path):
    model, out = tiny_checkpoint(), tmp_path / "stats"
    assert calibrated(run, model, out, "--data", text).needs == DEFAULT_NEEDS
    assert calibrated(run, model, out, "--data", text, "--full").needs == ALL_NEEDS
    assert calibrated(run, model, out, "--data", text, "--for", "fp8").needs == {"key.range", "value.range"}
    both = calibrated(run, model, out, "--data", text, "--for", "klt2", "--for", "fp8").needs
    assert both == calibrated(run, model, out, "--data", text, "--for", "klt2,fp8").needs
    assert both > {"key.range", "value.range"}
    refuse("calibrate", model, "-o", out, "--for", "kivi2", says=("'kivi2'", "reads no statistics"))
    refuse("calibrate", model, "-o", out, "--for", "fp8", "--full", says=("exclude each other",))


def test_small_statistics_serve_the_recipe_they_were_made_for(run, refuse, tiny_checkpoint, text, tmp_path):
    model, out = tiny_checkpoint(head_dim=32), tmp_path / "stats"
    calibrated(run, model, out, "--data", text, "--for", "fp8")
    result = run("export", model, "--recipe", "fp8", "-o", tmp_path / "export", "--stats", out)
    assert result.exit_code == 0, result.output
    stats = Stats.load(out)
    less = {i: LayerStats({"key.range": layer["key.range"]}) for i, layer in stats.layers.items()}
    replace(stats, layers=less).save(out)
    refuse(
        "export", model, "--recipe", "fp8", "-o", tmp_path / "other", "--stats", out, says=("'value.range'", "--for")
    )


@pytest.mark.parametrize("mode", ["flag", "limit"])
def test_layer_by_layer_writes_the_same_file(run, tiny_checkpoint, text, tmp_path, mode):
    model = tiny_checkpoint(layers=3)
    size = (model / "model.safetensors").stat().st_size
    args = ("--layer-by-layer",) if mode == "flag" else ("--memory-limit", f"{size // 2}")
    result = run("calibrate", model, "-o", tmp_path / "a", "--data", text, "--samples", 4, *args, "--json", "-")
    assert json.loads(result.stdout)["layer_by_layer"] is True
    # A limit with room for the model changes nothing.
    args = ("--memory-limit", "1GB", "--json", "-")
    result = run("calibrate", model, "-o", tmp_path / "b", "--data", text, "--samples", 4, *args)
    assert json.loads(result.stdout)["layer_by_layer"] is False
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "text.txt", "tiny"]


def test_a_device_map_spreads_the_model(run, refuse, tiny_checkpoint, text, tmp_path):
    """Here over the CPU and the disk, through the same hooks that several GPUs have."""
    model = tiny_checkpoint(layers=3)
    whole = calibrated(run, model, tmp_path / "stats", "--data", text)
    parts = ("model.embed_tokens", "model.layers.0", "model.layers.2", "model.norm", "model.rotary_emb", "lm_head")
    spread = dict.fromkeys(parts, "cpu") | {"model.layers.1": "disk"}
    stats = kvq.calibrate(model, data=text, samples=4, seq_len=32, device_map=spread)
    for index, layer in whole.layers.items():
        assert torch.equal(layer["key.range"].sum, stats.layers[index]["key.range"].sum)
    assert calibrated(run, model, tmp_path / "auto", "--data", text, "--device-map", "auto").needs == DEFAULT_NEEDS
    args = ("--device-map", "auto", "--layer-by-layer")
    refuse("calibrate", model, "-o", tmp_path / "no", "--data", text, *args, says=("device_map='auto'", "excludes"))


def test_conversations_and_documents(run, refuse, tiny_checkpoint, tmp_path):
    model, out, rows = tiny_checkpoint(), tmp_path / "stats", tmp_path / "rows.jsonl"
    chat = [{"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "General"}]
    rows.write_text("".join(json.dumps({"messages": chat, "n": i}) + "\n" for i in range(9)))
    data = calibrated(run, model, out, "--data", rows).data
    assert (data.form, data.source) == ("packed", "rows.jsonl")
    assert data.chat_template
    documents = calibrated(run, model, out, "--data", rows, "--per-document").data
    assert documents.form == "documents"
    assert documents.windows_sha256 != data.windows_sha256
    refuse("calibrate", model, "-o", out, "--data", rows, "--field", "body", says=("'body'", "messages, n"))
    plain = tmp_path / "plain.jsonl"
    plain.write_text("".join(json.dumps({"text": f"text {i} " * 9}) + "\n" for i in range(9)))
    assert not calibrated(run, model, out, "--data", plain).data.chat_template
    assert calibrated(run, model, out, "--data", plain, "--chat-template").data.chat_template


def test_tokens_that_the_statistics_name_are_spelled(run, tiny_checkpoint, text, tmp_path):
    stats = calibrated(run, tiny_checkpoint(), tmp_path / "stats", "--data", text)
    named = set(stats.layers[0]["sinks"].tops.token.flatten().tolist())
    assert named <= stats.token_texts.keys()
    assert all(len(text) == 1 for text in stats.token_texts.values())


def test_what_a_model_cannot_give_is_said(run, refuse, tiny_checkpoint, tiny_model, text, tmp_path):
    from transformers import FalconConfig

    config = FalconConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    folder = tiny_checkpoint(tiny_model(config))
    result = run("calibrate", folder, "-o", tmp_path / "stats", "--data", text, "--samples", 2, "--seq-len", 32)
    lines = [line for line in result.stdout.splitlines() if line.startswith("Not measured: ")]
    assert len(lines) == 1
    assert "query.range" in lines[0]
    assert "attention interface" in lines[0]


@pytest.mark.parametrize("size", ["8XB", "", "-1GB", "GB", "0"])
def test_a_size_that_is_none_is_refused(refuse, tmp_path, size):
    args = ("./no-model", "-o", tmp_path / "stats", "--memory-limit", size)
    refuse("calibrate", *args, says=("--memory-limit", "is no size"))


@pytest.mark.parametrize(
    ("text", "size"), [("8GB", 8 * 10**9), ("1.5GiB", 1610612736), ("500mb", 5 * 10**8), ("77", 77), ("2k", 2000)]
)
def test_sizes(text, size):
    assert Bytes().convert(text, None, None) == size


LEARNING = """
name: mine
key: {codec: affine, bits: 3, axis: token, group: head}
value: {codec: affine, bits: 3, axis: token, group: head}
transforms:
  key: [{kind: learned_matrix, steps: 6}]
  value: [{kind: hadamard}, {kind: learned_rotation, steps: 6}]
"""


@pytest.mark.parametrize("together", [False, True])
def test_learning_reports_time_memory_and_the_loss_curve(together, run, tiny_checkpoint, text, tmp_path):
    out, recipe = tmp_path / "stats.safetensors", tmp_path / "mine.yaml"
    recipe.write_text(LEARNING)
    args = ["--for", recipe, "--data", text, "--samples", 4, "--seq-len", 32, "--json", tmp_path / "result.json"]
    result = run("calibrate", tiny_checkpoint(), "-o", out, *args, *(["--end-to-end"] if together else []))
    report = json.loads((tmp_path / "result.json").read_text())
    assert [entry["what"] for entry in report["learning"]] == [
        "mine layer by layer",
        *(["mine end to end"] if together else []),
    ]
    assert all(entry["seconds"] > 0 and entry["peak_bytes"] > 1e7 for entry in report["learning"])
    blocks = [facts for facts in report["fits"].values() if facts["objective"] == "block"]
    assert {facts["step"]["kind"] for facts in blocks} == {"learned_matrix", "learned_rotation"}
    for facts in blocks:
        assert sorted(facts["layers"]) == ["0", "1"]
        assert all(len(layer["losses"]) == 6 for layer in facts["layers"].values())
    others = [facts for facts in report["fits"].values() if facts["objective"] == "logits"]
    assert len(others) == (2 if together else 0)
    assert all(len(facts["losses"]) == 100 for facts in others)
    assert "learned_rotation" in result.stdout
    assert "Learned mine layer by layer in" in result.stdout
    assert ("Learned mine end to end in" in result.stdout) == together


def test_a_transform_that_the_model_does_not_undo_is_refused_before_it_is_measured(
    refuse, tiny_checkpoint, tiny_model, text, tmp_path
):
    config = AutoConfig.for_model(
        "gemma2", vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=32,
        num_attention_heads=4, num_key_value_heads=2, attn_logit_softcapping=20.0, pad_token_id=0,
    )  # fmt: skip
    out = tmp_path / "stats.safetensors"
    args = ("-o", out, "--for", "smoothrot4", "--data", text)
    says = ("'shift' of keys is not exact for 'gemma2'", "softcap")
    refuse("calibrate", tiny_checkpoint(tiny_model(config)), *args, says=says)
    assert not out.exists()
