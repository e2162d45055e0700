"""What kvq relies on of safetensors, huggingface_hub and torch's FP8 numbers."""

import inspect
import json
import math

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file


def test_the_layout_of_a_safetensors_file():
    """Eight bytes of length, a JSON header, then the tensors end to end; the header begins with the metadata."""
    content = save({"a": torch.ones(3), "b": torch.zeros(2, dtype=torch.uint8)}, metadata={"format": "pt"})
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert header["a"]["dtype"] == "F32"
    assert header["a"]["shape"] == [3]
    assert max(entry["data_offsets"][1] for entry in header.values()) == 14 == len(content) - 8 - length


def test_a_rewritten_header_is_read_again():
    """kvq puts metadata into an order of its own, padded to a multiple of eight bytes."""
    content = save({"a": torch.ones(3)}, metadata={"x": "1", "a": "2"})
    end = 8 + int.from_bytes(content[:8], "little")
    entries = {n: e for n, e in json.loads(content[8:end]).items() if n != "__metadata__"}
    head = json.dumps({"__metadata__": {"a": "2", "x": "1"}, **entries}, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    assert torch.equal(load(len(head).to_bytes(8, "little") + head + content[end:])["a"], torch.ones(3))


def test_one_tensor_is_read_without_the_others(tmp_path):
    save_file({"a": torch.ones(3), "b": torch.zeros(2)}, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == ["a", "b"]
        assert torch.equal(file.get_tensor("a"), torch.ones(3))


def test_broken_files_raise_its_own_error(tmp_path):
    with pytest.raises(SafetensorError):
        load(b"\\x00" * 20)
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(SafetensorError):
        safe_open(tmp_path / "x.safetensors", framework="pt").__enter__()


def test_the_hub_functions_and_errors():
    wanted = {"allow_patterns", "ignore_patterns", "local_files_only"}
    assert wanted <= set(inspect.signature(huggingface_hub.snapshot_download).parameters)
    wanted = {"repo_id", "filename", "revision", "cache_dir"}
    assert wanted <= set(inspect.signature(huggingface_hub.hf_hub_download).parameters)
    assert isinstance(huggingface_hub.constants.HF_HUB_OFFLINE, bool)
    assert issubclass(GatedRepoError, Exception)
    assert issubclass(RepositoryNotFoundError, Exception)
    with pytest.raises(HFValidationError):
        huggingface_hub.snapshot_download("no/such/id")


def test_e4m3_rounds_to_nearest_even_and_ends_at_448():
    """448 is the largest number; halves between two numbers go to the even one; subnormal numbers reach 2^-9."""
    x = torch.tensor([448.0, 1.0625, 1.1875, 2.0**-9, 2.0**-10, 3 * 2.0**-10])
    assert x.to(torch.float8_e4m3fn).float().tolist() == [448.0, 1.0, 1.25, 2.0**-9, 0.0, 2 * 2.0**-9]
    assert torch.finfo(torch.float8_e4m3fn).max == 448.0
    assert math.isnan(float(torch.tensor(float("nan")).to(torch.float8_e4m3fn).float()))
    assert torch.tensor([1.0]).to(torch.float8_e4m3fn).view(torch.uint8).item() == 0x38


def test_bfloat16_bits_are_in_the_order_of_magnitudes():
    """Rounding up adds one to the bit pattern."""
    x = torch.tensor([1.0, 0.0078]).to(torch.bfloat16)
    above = (x.view(torch.int16) + 1).view(torch.bfloat16)
    assert bool((above > x).all())
    assert above[0].item() == 1.0 + 2.0**-7
