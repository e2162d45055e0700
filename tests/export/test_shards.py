"""Law: a folded file is its source but for the tensors that change, wherever these lie; nothing half-written passes."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvq.errors import CheckpointError
from kvq.export import shards
from kvq.export.shards import place_weights
from kvq.transforms.fold import Gamma

NAMES = [f"t{i}" for i in range(7)]


@pytest.fixture
def source(tmp_path):
    """Seven tensors of odd sizes, which lie in the file in the order of their names."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(37 * (i + 1), generator=generator).bfloat16() for i, name in enumerate(NAMES)}
    save_file(tensors | {"whole": torch.arange(5)}, tmp_path / "source.safetensors", metadata={"format": "pt"})
    return tmp_path / "source.safetensors"


def doubled(size: int) -> tuple[Gamma, ...]:
    return (Gamma(torch.full((size,), 2.0, dtype=torch.float64), 0),)


@pytest.mark.parametrize("block", [2, 61, 1 << 20])
@pytest.mark.parametrize("chosen", [["t0"], ["t6"], ["t2", "t3"], ["t0", "t3", "t6"], NAMES])
def test_only_what_folds_changes(source, tmp_path, chosen, block, monkeypatch):
    monkeypatch.setattr(shards, "_BLOCK", block)
    before, out = load_file(source), tmp_path / "out"
    out.mkdir()
    operations = {name: doubled(len(before[name])) for name in chosen}
    threads = torch.get_num_threads()
    counts = place_weights({"model.safetensors": source}, out, operations)
    assert counts == {"linked": 0, "copied": 0, "folded": 1}
    assert torch.get_num_threads() == threads
    after = load_file(out / "model.safetensors")
    assert (out / "model.safetensors").stat().st_size == source.stat().st_size
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor * 2 if name in chosen else tensor), name
    assert torch.equal(load_file(source)["t0"], before["t0"])


def test_nothing_to_fold_is_a_link(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    assert place_weights({"a.safetensors": source}, out, {"absent": doubled(3)})["linked"] == 1
    assert os.path.samefile(out / "a.safetensors", source)


def test_integers_are_refused_before_anything_is_written(source, tmp_path):
    with pytest.raises(CheckpointError, match="'whole' has dtype I64"):
        place_weights({"a.safetensors": source}, tmp_path, {"whole": doubled(5)})
    assert not (tmp_path / "a.safetensors").exists()


def test_what_fails_in_the_copying_thread_is_raised(source, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "_copy_between", full)
    with pytest.raises(OSError, match="No space left"):
        place_weights({"a.safetensors": source}, tmp_path, {"t1": doubled(74)})
