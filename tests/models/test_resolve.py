"""Names become checked folders; every failure is one sentence of kvq; fingerprints follow the weights."""

import json
import os
import shutil

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from kvq.errors import CheckpointError, KvqError, ModelNotFoundError, UnsupportedModelError
from kvq.models.resolve import (
    check_weights,
    load_config,
    load_model,
    load_tokenizer,
    read_header,
    resolve_model,
    weights_fingerprint,
)


@pytest.fixture
def sharded(tiny_model, tmp_path):
    folder = tmp_path / "sharded"
    tiny_model(layers=3).save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def assert_one_sentence(error: KvqError):
    assert "\n" not in str(error)
    assert str(error).endswith(".")


def test_a_local_folder_is_itself(tiny_checkpoint):
    folder = tiny_checkpoint()
    assert resolve_model(folder) == folder
    assert resolve_model(str(folder)) == folder


@pytest.mark.parametrize("name", ["./missing", "~/missing-model", "/missing/model", "a/b/c", "../x"])
def test_a_path_that_does_not_exist_never_reaches_the_hub(name, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", forbidden)
    with pytest.raises(ModelNotFoundError, match="does not exist") as error:
        resolve_model(name)
    assert_one_sentence(error.value)


@pytest.mark.parametrize(("name", "offline"), [("nobody/no-such-model", False), ("gpt-none", True)])
def test_no_network_is_one_sentence(name, offline):
    with pytest.raises(ModelNotFoundError, match="not on disk and cannot be fetched") as error:
        resolve_model(name, offline=offline)
    assert name in str(error.value)
    assert_one_sentence(error.value)


def test_a_malformed_name_is_refused():
    with pytest.raises(ModelNotFoundError, match="neither a folder nor a hub id"):
        resolve_model("no such model")


def test_a_hub_id_is_downloaded_without_pickles_or_subfolders(tiny_checkpoint, monkeypatch):
    folder, asked = tiny_checkpoint(), {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **kw: asked.update(kw, name=name) or folder)
    assert resolve_model("owner/model", offline=True) == folder
    assert asked["name"] == "owner/model"
    assert asked["local_files_only"] is True
    assert "*.safetensors" in asked["allow_patterns"]
    assert not any("bin" in pattern or "py" in pattern for pattern in asked["allow_patterns"])


def test_a_file_is_not_a_model(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ModelNotFoundError, match="is a file: give the folder"):
        resolve_model(file)


def test_a_folder_needs_a_config(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        resolve_model(tmp_path)


@pytest.mark.parametrize(("extra", "reason"), [("pytorch_model.bin", "pickled weights"), (None, r"no \*\.safetensors")])
def test_a_folder_needs_safetensors(tmp_path, extra, reason):
    (tmp_path / "config.json").write_text("{}")
    if extra:
        (tmp_path / extra).touch()
    with pytest.raises(CheckpointError, match=reason) as error:
        resolve_model(tmp_path)
    assert_one_sentence(error.value)


def test_whole_weights_pass(sharded, tiny_checkpoint):
    assert check_weights(sharded) == sorted(sharded.glob("*.safetensors"))
    single = tiny_checkpoint()
    assert check_weights(single) == [single / "model.safetensors"]


@pytest.mark.parametrize("kept", [0, 5, 100, -1], ids=["empty", "no-length", "half-header", "one-byte-short"])
def test_a_truncated_file_is_named(sharded, kept):
    file = sorted(sharded.glob("*.safetensors"))[1]
    size = file.stat().st_size
    os.truncate(file, kept if kept >= 0 else size + kept)
    with pytest.raises(CheckpointError, match=file.name) as error:
        check_weights(sharded)
    assert_one_sentence(error.value)


def test_surplus_bytes_and_garbage_are_refused(sharded):
    file = sorted(sharded.glob("*.safetensors"))[0]
    whole = file.read_bytes()
    file.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match="truncated or altered"):
        check_weights(sharded)
    file.write_bytes(whole[:8] + b"x" * (len(whole) - 8))
    with pytest.raises(CheckpointError, match="not a valid safetensors file"):
        check_weights(sharded)


def test_a_header_whose_tensors_overlap_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4), "b": torch.ones(4)}, file)
    assert set(read_header(file)) >= {"a", "b"}
    whole = file.read_bytes()
    # The second tensor now begins where the first does; lengths and file size stay as they were.
    file.write_bytes(whole.replace(b"[16,32]", b"[ 0,16]"))
    with pytest.raises(CheckpointError, match="not a valid safetensors file"):
        read_header(file)


def test_a_missing_shard_is_named(sharded):
    file = sorted(sharded.glob("*.safetensors"))[-1]
    file.unlink()
    with pytest.raises(CheckpointError, match=f"{file.name}.*is missing"):
        check_weights(sharded)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}'])
def test_a_broken_index_is_refused(sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="not a readable shard index"):
        check_weights(sharded)


def test_an_index_cannot_leave_its_folder(sharded):
    index = sharded / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"][next(iter(data["weight_map"]))] = "../sharded/model.safetensors"
    index.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="is missing"):
        check_weights(sharded)


def test_fingerprint_survives_copies_and_links(sharded, tmp_path):
    base = weights_fingerprint(sharded)
    copied, linked = tmp_path / "copied", tmp_path / "linked"
    shutil.copytree(sharded, copied)
    shutil.copytree(sharded, linked, copy_function=os.link)
    assert weights_fingerprint(copied) == weights_fingerprint(linked) == base


@pytest.mark.parametrize("where", [0, -1], ids=["first-number", "last-number"])
def test_fingerprint_sees_one_changed_number(sharded, where):
    base = weights_fingerprint(sharded)
    file = sorted(sharded.glob("*.safetensors"))[-1]
    tensors = load_file(file)
    name = sorted(tensors)[where]
    tensors[name].view(-1)[where] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    assert weights_fingerprint(sharded) != base


def test_model_round_trips_with_the_default_dtypes(tiny_model, tiny_checkpoint):
    model = tiny_model(dtype=torch.bfloat16)
    loaded = load_model(tiny_checkpoint(model), device="cpu")
    assert loaded.dtype == torch.float32
    assert not loaded.training
    ours, theirs = loaded.state_dict(), model.float().state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_dtype_and_attention_can_be_chosen(tiny_checkpoint):
    loaded = load_model(tiny_checkpoint(), device="cpu", dtype=torch.float64, attn_implementation="eager")
    assert loaded.dtype == torch.float64
    assert loaded.config._attn_implementation == "eager"


def test_a_model_that_lacks_a_weight_is_refused(tiny_checkpoint):
    folder = tiny_checkpoint()
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 of its weights.*layers\.1\.self_attn\.k_proj"):
        load_model(folder, device="cpu")


def test_a_model_of_other_shapes_is_refused(tiny_checkpoint):
    folder = tiny_checkpoint()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 32}))
    with pytest.raises(CheckpointError, match="cannot be loaded") as error:
        load_model(folder, device="cpu")
    assert "\n" not in str(error.value)


def test_truncated_weights_are_named_on_loading(tiny_checkpoint):
    folder = tiny_checkpoint()
    os.truncate(folder / "model.safetensors", 1000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*truncated"):
        load_model(folder, device="cpu")


def test_config_loads_or_says_why(tiny_checkpoint):
    folder = tiny_checkpoint()
    assert load_config(folder).num_hidden_layers == 2
    (folder / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(UnsupportedModelError, match="'unheard-of'"):
        load_config(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json .* cannot be read"):
        load_config(folder)


def test_tokenizer_loads_or_says_why(tiny_checkpoint):
    folder = tiny_checkpoint()
    assert load_tokenizer(folder).decode(load_tokenizer(folder)("a b")["input_ids"]) == "a b"
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be loaded") as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        load_tokenizer(folder)
