"""The statistics file: same bits back, same bytes for the same statistics, and no damaged or foreign file passes."""

import json
import os

import pytest
import torch

from kvq.calib import stats as stats_module
from kvq.calib.data import DataIdentity
from kvq.calib.observers import observe
from kvq.calib.stats import LayerStats, Stats
from kvq.errors import CheckpointError
from kvq.models.describe import describe
from kvq.models.resolve import read_header

DATA = DataIdentity(source="builtin", text_sha256="aa", tokenizer_sha256="bb", samples=3, seq_len=5, seed=0, tokens=15)


def make_stats(config, seed: int = 0, **settings) -> Stats:
    generator = torch.Generator().manual_seed(seed)
    layers = {
        i: LayerStats(*(observe(torch.randn(1, 2, 9, 16, generator=generator)) for _ in range(2))) for i in (0, 1, 10)
    }
    facts = {
        "model": "tiny",
        "model_fingerprint": describe(config).fingerprint,
        "weights_fingerprint": "ff",
        "data": DATA,
        "versions": {"torch": "1"},
    }
    return Stats(layers=layers, **(facts | settings))


@pytest.fixture
def stats(tiny_config) -> Stats:
    return make_stats(tiny_config())


def test_save_and_load_give_the_same_bits(stats, tmp_path):
    stats.save(tmp_path / "a.kvqstats")
    loaded = Stats.load(tmp_path / "a.kvqstats")
    assert loaded.provenance() == stats.provenance()
    assert list(loaded.layers) == [0, 1, 10]
    for index, layer in stats.layers.items():
        for side in ("key", "value"):
            ours, theirs = getattr(layer, side), getattr(loaded.layers[index], side)
            assert ours.count == theirs.count
            for name in ("min", "max", "sum", "sum_squares", "absmax", "mean", "rms"):
                assert torch.equal(getattr(ours, name), getattr(theirs, name))
                assert getattr(ours, name).dtype == getattr(theirs, name).dtype


def test_shapes_and_dtypes_are_the_contract(stats):
    key = stats.layers[1].key
    assert key.absmax.shape == key.rms.shape == (2, 16)
    assert key.absmax.dtype == key.mean.dtype == torch.float32
    assert key.sum.dtype == torch.float64


def test_the_same_statistics_give_the_same_bytes(tiny_config, tmp_path):
    for name in ("a", "b"):
        make_stats(tiny_config()).save(tmp_path / name)
    make_stats(tiny_config(), seed=1).save(tmp_path / "c")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_the_file_is_plain_safetensors_with_named_tensors(stats, tmp_path):
    from safetensors.torch import load_file

    stats.save(tmp_path / "a")
    tensors = load_file(tmp_path / "a")
    assert torch.equal(tensors["layers.10.value.absmax"], stats.layers[10].value.absmax)
    metadata = read_header(tmp_path / "a")["__metadata__"]
    assert metadata["kvq_stats"] == "1"
    assert str(tmp_path) not in json.dumps(metadata)


def test_a_missing_or_foreign_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(CheckpointError, match="does not exist: make it with 'kvq calibrate'"):
        Stats.load(tmp_path / "none")
    save_file({"a": torch.ones(2)}, tmp_path / "other")
    with pytest.raises(CheckpointError, match="not a statistics file"):
        Stats.load(tmp_path / "other")


def test_every_truncation_is_refused(stats, tmp_path):
    stats.save(tmp_path / "a")
    whole = (tmp_path / "a").read_bytes()
    for kept in (0, 7, 8, 300, len(whole) // 2, len(whole) - 1):
        (tmp_path / "a").write_bytes(whole[:kept])
        with pytest.raises(CheckpointError) as error:
            Stats.load(tmp_path / "a")
        assert "\n" not in str(error.value)


def test_every_altered_part_is_noticed(stats, tmp_path):
    stats.save(tmp_path / "a")
    whole = (tmp_path / "a").read_bytes()
    data = 8 + int.from_bytes(whole[:8], "little")
    places = [whole.index(b"tiny"), whole.index(b"counts") + 15, data, (data + len(whole)) // 2, len(whole) - 1]
    for place in places:
        altered = bytearray(whole)
        altered[place] ^= 1
        (tmp_path / "a").write_bytes(bytes(altered))
        with pytest.raises(CheckpointError):
            Stats.load(tmp_path / "a")


def test_an_unknown_version_is_refused_with_a_way_out(stats, tmp_path, monkeypatch):
    monkeypatch.setattr(stats_module, "STATS_VERSION", "2")
    stats.save(tmp_path / "a")
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="format '2' and this kvq reads '1': run 'kvq calibrate' again"):
        Stats.load(tmp_path / "a")


def test_statistics_of_another_model_are_refused(stats, tiny_config):
    stats.check_model(describe(tiny_config()))
    stats.check_model(describe(tiny_config(dtype=torch.bfloat16)), "ff")
    with pytest.raises(CheckpointError, match="of 'tiny', a model of another shape"):
        stats.check_model(describe(tiny_config(kv_heads=4)))
    with pytest.raises(CheckpointError, match="with other weights"):
        stats.check_model(describe(tiny_config()), "00")


def test_a_full_disk_leaves_the_old_file_and_nothing_else(stats, tmp_path, monkeypatch):
    target = tmp_path / "a"
    target.write_bytes(b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device") as error:
        stats.save(target)
    assert "\n" not in str(error.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
    assert target.read_bytes() == b"old"


def test_a_place_that_does_not_exist_is_one_sentence(stats, tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "none" / "a", tmp_path / "file" / "a"):
        with pytest.raises(CheckpointError, match="cannot be written"):
            stats.save(place)
