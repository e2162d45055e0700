"""Law: a folded file is its source but for the tensors that change, wherever these lie; nothing half-written passes."""

import os
import shutil
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvq.errors import CheckpointError
from kvq.exporting import shards
from kvq.exporting.shards import placing_weights
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


def place(files, work, operations, put=()) -> dict[str, int]:
    """Place weights; ``put``: folded tensors by name, the others are folded at the end."""
    work.mkdir(exist_ok=True)
    with placing_weights(files, work, operations) as placed:
        for name, tensor in dict(put).items():
            placed.put(name, tensor)
    return placed.counts


@pytest.mark.parametrize("block", [2, 61, 1 << 20])
@pytest.mark.parametrize("chosen", [["t0"], ["t6"], ["t2", "t3"], ["t0", "t3", "t6"], NAMES])
def test_only_what_folds_changes(source, tmp_path, chosen, block, monkeypatch):
    monkeypatch.setattr(shards, "_BLOCK", block)
    before, out = load_file(source), tmp_path / "out"
    operations = {name: doubled(len(before[name])) for name in chosen}
    counts = place({"model.safetensors": source}, out, operations)
    assert counts == {"linked": 0, "copied": 0, "folded": 1}
    after = load_file(out / "model.safetensors")
    assert (out / "model.safetensors").stat().st_size == source.stat().st_size
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor * 2 if name in chosen else tensor), name
    assert torch.equal(load_file(source)["t0"], before["t0"])


@pytest.mark.parametrize("given", [[], ["t3"], ["t6", "t0"], ["t0", "t3", "t6"]])
def test_what_is_put_is_written_and_the_rest_is_folded(source, tmp_path, given):
    before = load_file(source)
    operations = {name: doubled(len(before[name])) for name in ("t0", "t3", "t6")}
    # Not what folding gives, so that it shows whose tensor was written.
    place({"a.safetensors": source}, tmp_path / "out", operations, {name: before[name] * 3 for name in given})
    after = load_file(tmp_path / "out/a.safetensors")
    for name, tensor in before.items():
        factor = 3 if name in given else 2 if name in operations else 1
        assert torch.equal(after[name], tensor * factor), name


def test_a_tensor_that_is_put_twice_is_written_once(source, tmp_path):
    before, out = load_file(source), tmp_path / "out"
    out.mkdir()
    with placing_weights({"a.safetensors": source}, out, {"t3": doubled(148)}) as placed:
        placed.put("t3", before["t3"] * 3)
        placed.put("t3", before["t3"] * 5)
    assert torch.equal(load_file(out / "a.safetensors")["t3"], before["t3"] * 3)


def test_nothing_to_fold_is_a_link(source, tmp_path):
    out = tmp_path / "out"
    assert place({"a.safetensors": source}, out, {"absent": doubled(3)})["linked"] == 1
    assert os.path.samefile(out / "a.safetensors", source)


def test_where_links_are_refused_files_are_copied(source, tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(18, "no links")

    copy, seen = shutil.copyfile, []
    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(shutil, "copyfile", lambda a, b: (seen.append(b.exists()), copy(a, b)))
    assert place({"a.safetensors": source}, tmp_path / "out", {}) == {"linked": 0, "copied": 1, "folded": 0}
    # To fill a file that was there takes several times as long on ext4, which then waits for the disk.
    assert seen == [False]
    assert (tmp_path / "out/a.safetensors").read_bytes() == source.read_bytes()


def test_folded_files_and_only_these_are_on_the_disk_in_the_end(source, tmp_path, monkeypatch):
    """The last flush comes after the last byte: what was written when is seen from the file itself."""
    seen = []

    def flush(path):
        seen.append((path.name, path.read_bytes()))

    def refuse(*arguments):
        raise OSError(18, "no links")

    monkeypatch.setattr(shards, "flush_file", flush)
    monkeypatch.setattr(os, "link", refuse)
    other = tmp_path / "other.safetensors"
    save_file({"x": torch.ones(3)}, other)
    place({"a.safetensors": source, "b.safetensors": other}, tmp_path / "out", {"t1": doubled(74)})
    assert {name for name, _ in seen} == {"a.safetensors"}
    assert seen[-1][1] == (tmp_path / "out/a.safetensors").read_bytes()


def test_integers_are_refused_before_anything_is_written(source, tmp_path):
    with pytest.raises(CheckpointError, match="'whole' has dtype I64"):
        place({"a.safetensors": source}, tmp_path, {"whole": doubled(5)})
    assert not (tmp_path / "a.safetensors").exists()


def full(*arguments):
    raise OSError(28, "No space left on device")


def test_what_fails_in_the_copying_thread_is_raised(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_copy_between", full)
    with pytest.raises(OSError, match="No space left"):
        place({"a.safetensors": source}, tmp_path, {"t1": doubled(74)})


def test_what_has_failed_there_ends_the_block_at_the_next_tensor(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_copy_between", full)
    reached = []

    def block():
        with placing_weights({"a.safetensors": source}, tmp_path, {"t1": doubled(74)}) as placed:
            wait_until(placed._copying.done)
            placed.put("t1", load_file(source)["t1"])
            reached.append("the next tensor")

    with pytest.raises(OSError, match="No space left"):
        block()
    assert not reached


def test_a_block_that_fails_stops_the_copy(source, tmp_path, monkeypatch):
    """The thread waits in the middle of the copy until the block has failed, and writes nothing after that."""
    write, failed, waiting = shards._write, threading.Event(), threading.Event()

    def slow(file, content):
        waiting.set()
        assert failed.wait(60)
        write(file, content)

    monkeypatch.setattr(shards, "_write", slow)
    monkeypatch.setattr(shards, "_BLOCK", 16)
    monkeypatch.setattr(shards, "flush_file", full)
    stop = shards.PlacedWeights.stop
    monkeypatch.setattr(shards.PlacedWeights, "stop", lambda placed: (stop(placed), failed.set()))

    def block():
        with placing_weights({"a.safetensors": source}, tmp_path, {"t6": doubled(259)}):
            assert waiting.wait(60)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        block()
    assert not any((tmp_path / "a.safetensors").read_bytes()[16:])


@pytest.mark.parametrize("copied", [False, True])
def test_a_core_is_left_to_the_copy_and_given_back(source, tmp_path, copied, monkeypatch):
    threads, flushed = torch.get_num_threads(), threading.Event()
    monkeypatch.setattr(shards, "flush_file", lambda path: flushed.wait(60))

    def block():
        with placing_weights({"a.safetensors": source}, tmp_path, {"t1": doubled(74)}) as placed:
            assert torch.get_num_threads() == 2
            if copied:
                wait_until(placed._copied.is_set)
                placed.put("t1", load_file(source)["t1"])
                # The disk is still busy, no core is.
                assert not placed._copying.done()
                assert torch.get_num_threads() == 3
            flushed.set()
            raise KeyboardInterrupt

    torch.set_num_threads(3)
    try:
        with pytest.raises(KeyboardInterrupt):
            block()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


def wait_until(condition) -> None:
    for _ in range(6000):
        if condition():
            return
        threading.Event().wait(0.01)
    pytest.fail("waited for a minute in vain")
