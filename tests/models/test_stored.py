"""Tensors read from their place in a file are those that safetensors reads."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvq.errors import CheckpointError
from kvq.models.stored import stored_tensors, tensors_of


@pytest.fixture
def file(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(5, 3, generator=generator, dtype=torch.float64),
        "b": torch.randn(7, generator=generator).to(torch.bfloat16),
        "c": torch.tensor(2.5),
        "d": torch.randn(2, 4, 3, generator=generator).half(),
        "e": torch.empty(0, 3),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def test_tensors_are_the_files(file):
    expected, found = load_file(file), tensors_of(file.parent)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].read(), tensor), name
        if tensor.ndim and len(tensor):
            assert torch.equal(found[name].mapped(), tensor)


def test_writing_to_what_was_mapped_does_not_reach_the_file(file):
    before = file.read_bytes()
    tensors_of(file.parent)["a"].mapped().zero_()
    assert file.read_bytes() == before


def test_a_file_that_becomes_shorter_is_an_error(file):
    first = next(stored_tensors(file))
    file.write_bytes(file.read_bytes()[: first.start + 1])
    with pytest.raises(CheckpointError, match="became shorter"):
        first.read()
