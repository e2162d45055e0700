"""The statistics file: same bits back, same bytes for the same statistics, and no damaged or foreign file passes."""

import json
import os
from dataclasses import replace

import pytest
import torch

from kvq.calib import stats as stats_module
from kvq.calib.data import DataIdentity
from kvq.calib.needs import ALL_NEEDS, JOINT_NEEDS, TENSORS
from kvq.calib.observers import KINDS, Histogram, JointMoments, Massive, Moments, Range, Reservoir, Sinks
from kvq.calib.observers.tokens import window_priorities
from kvq.calib.stats import Fit, LayerStats, Stats, config_data
from kvq.errors import CheckpointError, DataError
from kvq.models.describe import describe
from kvq.models.resolve import read_header

DATA = DataIdentity(source="builtin", text_sha256="aa", tokenizer_sha256="bb", samples=3, seq_len=5, seed=0, tokens=15)


def make_layer(seed: int) -> LayerStats:
    """One of everything, of 2 windows of 9 tokens."""
    g = torch.Generator().manual_seed(seed)
    tokens, hidden = torch.randint(0, 99, (2, 9), generator=g), torch.randn(2, 9, 24, generator=g)
    x = {name: torch.randn(2, 4 if name == "query" else 2, 9, 16, generator=g) for name in TENSORS}
    priority = window_priorities(tokens, None)
    parts = {
        f"{name}.{kind.__name__.lower()}": kind.observe(x[name]).grouped(2)
        for name in x
        for kind in (Range, Histogram, Moments)
    }
    parts |= {f"{name}.joint_moments": JointMoments.observe(x[name]) for name in ("key", "key_pre", "value")}
    parts["query_pre.moments"] = Moments.observe(x["query"]).grouped(2)
    parts |= {"key_page.range": Range.observe(x["key"]), "key_page.histogram": Histogram.observe(x["key"])}
    parts["value.weighted_moments"] = Moments.observe(x["value"], torch.rand(2, 2, 9, generator=g))
    parts["reservoir"] = Reservoir.observe(
        x["query"], x["key"], x["value"], None, rows=[0, 1], priority=priority, scaling=0.25, capacity=10**6
    )
    parts["massive"] = Massive.observe(hidden, tokens, None, priority)
    weights = torch.rand(2, 4, 8, 9, generator=g)
    parts["sinks"] = Sinks.observe(weights, x["key"], x["value"], tokens, None, priority, torch.tensor([8, 8]))
    return LayerStats(parts)


def make_stats(config, seed: int = 0, **settings) -> Stats:
    facts = {
        "model": "tiny",
        "model_fingerprint": describe(config).fingerprint,
        "config": config_data(config),
        "weights_fingerprint": "ff",
        "data": DATA,
        "versions": {"torch": "1"},
        "missing": {"key_pre.range": "no rotary embedding."},
        "token_texts": {7: "\n", 11: "a"},
    }
    return Stats(layers={i: make_layer(seed + i) for i in (0, 1, 10)}, **(facts | settings))


def assert_same(one: Stats, two: Stats):
    assert one.to_parts()[1] == two.to_parts()[1]
    ours, theirs = one.to_parts()[0], two.to_parts()[0]
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        assert torch.equal(x, theirs[name]), name
        assert x.dtype == theirs[name].dtype


@pytest.fixture
def stats(tiny_config) -> Stats:
    return make_stats(tiny_config())


def test_the_example_holds_one_of_everything(stats):
    """So that no kind is left out of the tests below."""
    assert stats.needs == ALL_NEEDS | JOINT_NEEDS
    assert {need.rpartition(".")[2] for need in stats.needs} == set(KINDS)


def test_save_and_load_give_the_same_bits(stats, tmp_path):
    stats.save(tmp_path / "a.kvqstats")
    loaded = Stats.load(tmp_path / "a.kvqstats")
    assert_same(loaded, stats)
    assert list(loaded.layers) == [0, 1, 10]
    assert loaded.provenance() == stats.provenance()
    assert (loaded.missing, loaded.token_texts, loaded.config) == (stats.missing, stats.token_texts, stats.config)


def test_the_model_can_be_described_from_the_file_alone(stats, tiny_config, tmp_path):
    stats.save(tmp_path / "a")
    spec = Stats.load(tmp_path / "a").spec()
    assert spec.fingerprint == describe(tiny_config()).fingerprint
    with pytest.raises(CheckpointError, match="hold no config"):
        replace(stats, config={}).spec()


def test_a_config_is_stored_without_names_of_this_machine(tiny_checkpoint, tmp_path):
    from kvq.models.resolve import load_config

    data = json.dumps(config_data(load_config(tiny_checkpoint())))
    assert str(tmp_path) not in data


def test_a_missing_statistic_is_named_with_the_way_out():
    layer = make_layer(0)
    with pytest.raises(DataError, match=r"hold no 'key\.entropy': run 'kvq calibrate' again with --for RECIPE"):
        layer["key.entropy"]
    assert "key.range" in layer


FIT = Fit(tensors={"rotation": torch.eye(4), "loss": torch.tensor(0.5)}, facts={"steps": 3, "seed": 0})


def test_fits_are_kept_with_the_statistics(stats, tmp_path):
    fitted = stats.with_fit("spin", FIT)
    assert not stats.fits
    fitted.save(tmp_path / "fitted")
    stats.save(tmp_path / "plain")
    loaded = Stats.load(tmp_path / "fitted")
    assert_same(loaded, fitted)
    assert loaded.fits["spin"].facts == FIT.facts
    assert torch.equal(loaded.fits["spin"].tensors["rotation"], torch.eye(4))
    assert (tmp_path / "fitted").read_bytes() != (tmp_path / "plain").read_bytes()
    replaced = fitted.with_fit("spin", Fit(tensors={"rotation": torch.zeros(1)}))
    assert replaced.fits["spin"].tensors["rotation"].shape == (1,)
    for name in ("", "a.b"):
        with pytest.raises(DataError, match="no name of a fit"):
            stats.with_fit(name, FIT)


def test_statistics_of_two_texts_join(tiny_config):
    other = make_stats(tiny_config(), seed=5, data=replace(DATA, windows_sha256="other"))
    one = make_stats(tiny_config())
    both = one.merge(other)
    for index in (0, 1, 10):
        for need in ALL_NEEDS | JOINT_NEEDS:
            expected = one.layers[index][need].merge(other.layers[index][need]).tensors()
            got = both.layers[index][need].tensors()
            assert all(torch.equal(x, got[name]) for name, x in expected.items()), need
    assert both.data.samples == 2 * DATA.samples
    assert both.layers[0]["key.range"].count == 2 * 18


def test_what_cannot_be_joined_is_refused(tiny_config):
    one = make_stats(tiny_config())
    other = make_stats(tiny_config(), seed=5, data=replace(DATA, windows_sha256="other"))
    with pytest.raises(DataError, match="fit 'spin' was learned from one run and cannot be joined"):
        one.merge(other.with_fit("spin", FIT))
    with pytest.raises(CheckpointError, match="different models"):
        one.merge(make_stats(tiny_config(kv_heads=4)))
    with pytest.raises(CheckpointError, match="different models"):
        one.merge(make_stats(tiny_config(), weights_fingerprint="00"))
    with pytest.raises(DataError, match="same windows"):
        one.merge(make_stats(tiny_config()))
    less = LayerStats({"key.range": one.layers[0]["key.range"]})
    with pytest.raises(DataError, match="only one of two statistics holds"):
        one.merge(replace(other, layers=dict.fromkeys(one.layers, less)))


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
    assert torch.equal(tensors["layers.10.value.range.absmax"], stats.layers[10]["value.range"].absmax)
    metadata = read_header(tmp_path / "a")["__metadata__"]
    assert metadata["kvq_stats"] == "2"
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
    places = [whole.index(b"tiny"), whole.index(b"first_bin") + 12, data, (data + len(whole)) // 2, len(whole) - 1]
    for place in places:
        altered = bytearray(whole)
        altered[place] ^= 1
        (tmp_path / "a").write_bytes(bytes(altered))
        with pytest.raises(CheckpointError):
            Stats.load(tmp_path / "a")


@pytest.mark.parametrize("version", ["1", "3"])
def test_another_version_is_refused_with_a_way_out(stats, tmp_path, monkeypatch, version):
    monkeypatch.setattr(stats_module, "STATS_VERSION", version)
    stats.save(tmp_path / "a")
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=f"format '{version}' and this kvq reads '2': run 'kvq calibrate' again"):
        Stats.load(tmp_path / "a")


def test_statistics_of_another_model_are_refused(stats, tiny_config):
    stats.check_model(describe(tiny_config()))
    stats.check_model(describe(tiny_config(dtype=torch.bfloat16)), "ff")
    with pytest.raises(CheckpointError, match="of 'tiny', a model of another shape"):
        stats.check_model(describe(tiny_config(kv_heads=4)))
    with pytest.raises(CheckpointError, match="with other weights"):
        stats.check_model(describe(tiny_config()), "00")
    stats.check_model(describe(tiny_config()), "ff", "bb")
    with pytest.raises(CheckpointError, match="with another tokenizer"):
        stats.check_model(describe(tiny_config()), "ff", "cc")


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
