"""``kvq calibrate``."""

import errno
import json

import torch

from kvq.calib.stats import Stats


def test_calibrate_writes_statistics_of_the_model(run, tiny_checkpoint, text, tmp_path):
    out = tmp_path / "stats.safetensors"
    args = ("--data", text, "--samples", 4, "--seq-len", 32, "--batch-size", 3, "--json", "-")
    result = run("calibrate", tiny_checkpoint(layers=3), "-o", out, *args)
    report = json.loads(result.stdout)
    assert (report["layers"], report["tokens"], report["data"]["source"]) == (3, 128, "text.txt")
    stats = Stats.load(out)
    assert sorted(stats.layers) == [0, 1, 2]
    assert stats.layers[0].key.count == 128
    assert "4 x 32 tokens" in result.stderr
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
