"""Hidden states come back to the bit, and a full disk shows before any work."""

import errno
import os

import pytest
import torch

from kvq.calib.spill import Spill
from kvq.errors import CheckpointError

SHAPES = [(4, 1), (2, 7), (1, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_written_is_read(tmp_path, dtype):
    path = tmp_path / "hidden.bin"
    spill = Spill.create(path, SHAPES, 24, dtype)
    tensors = [torch.randn(*shape, 24).to(dtype) for shape in SHAPES]
    for index in (2, 0, 1):
        spill.write(index, tensors[index])
    assert not path.exists()
    spill.finish()
    assert path.stat().st_size == sum(x.nbytes for x in tensors)
    again = Spill.open(path, SHAPES, dtype)
    assert again.width == 24
    assert all(torch.equal(again.read(i), x) for i, x in enumerate(tensors))
    again.close()
    assert [p.name for p in tmp_path.iterdir()] == ["hidden.bin"]


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CheckpointError, match="the disk is full: free space") as error:
        Spill.create(tmp_path / "hidden.bin", SHAPES, 24, torch.float32)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_file_of_other_shapes_is_refused(tmp_path):
    path = tmp_path / "hidden.bin"
    path.write_bytes(b"x" * 21)
    with pytest.raises(CheckpointError, match="not what this run wrote"):
        Spill.open(path, SHAPES, torch.float32)
