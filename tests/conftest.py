"""Shared fixtures: tiny random models built from configs, a tiny tokenizer, and the embedded real model.

Everything here is offline. The factories are fixtures that return functions, so a test asks for what it needs:

    def test_something(tiny_model, tiny_checkpoint): model = tiny_model(layers=3, dtype=torch.float64)
"""

import os
import shutil
import signal

# Set before transformers is imported: no test may reach the network by accident.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Triton reads this when a kernel is defined. TRITON_INTERPRET=0 runs tests/kernels on a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")
# Shapes in signatures are checked at every call (kvq/shapes.py).
os.environ.setdefault("KVQ_CHECK_SHAPES", "1")
# Background jobs of a shell ignore SIGINT, and so would the processes that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import string
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

VOCAB = 128
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tiny_config(
    *, layers: int = 2, heads: int = 4, kv_heads: int = 2, head_dim: int = 16, max_length: int = 4096, **settings
) -> LlamaConfig:
    """A Llama config with grouped heads. ``settings`` overrides any field of LlamaConfig."""
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": heads * head_dim,
        "intermediate_size": 2 * heads * head_dim,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": max_length,
        # The default 0.02 leaves attention nearly uniform, so a wrong cache would hardly show in the logits.
        "initializer_range": 0.15,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**(fields | settings))


def make_tiny_model(config=None, *, seed: int = 0, dtype: torch.dtype = torch.float32, **settings):
    """A random causal model in eval mode: from ``config`` (any family), or from ``make_tiny_config(**settings)``."""
    config = config if config is not None else make_tiny_config(**settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # Drawn in float32 and then cast, so that every dtype has the same weights.
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    return model.to(dtype).eval()


def make_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character, ChatML template, no BOS; 101 of the 128 ids are used."""
    characters = [*string.ascii_letters, *string.digits, *string.punctuation, " ", "\n", "\t"]
    vocab = {token: i for i, token in enumerate([*SPECIALS, *characters])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<unk>",
        chat_template=CHATML,
    )


# Families that differ in what calibration sees.
_LLAMA_LIKE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
}
_HYBRID = {
    "head_dim": 32,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 8,
}
_MOE = {"head_dim": 32, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
_SETTINGS = {
    "llama": {},
    "gemma2": _HYBRID,
    "gemma3_text": _HYBRID,
    "cohere2": _HYBRID,
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0]},
    "phi3": {"partial_rotary_factor": 0.5},
    "glm4": {"head_dim": 16},
    "gpt_oss": _HYBRID | {"num_local_experts": 4},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": _MOE,
    "qwen3_next": _MOE
    | {
        "num_hidden_layers": 4,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "shared_expert_intermediate_size": 32,
    },
    "olmo2": {},
    "llama4_text": {"head_dim": 16, "num_hidden_layers": 4, "num_local_experts": 2, "intermediate_size_mlp": 96},
    "gpt_neox": {},
    "gemma3n_text": _HYBRID
    | {"num_kv_shared_layers": 2, "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 16},
}
_OWN = {
    "gpt2": {"vocab_size": 128, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4},
    "gptj": {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
    "bloom": {"vocab_size": 128, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "falcon": {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
}


def family_config(name: str) -> PretrainedConfig:
    settings = _OWN[name] if name in _OWN else _LLAMA_LIKE | _SETTINGS[name]
    return CONFIG_MAPPING[name](**settings)


# trylast: pytest itself has then brought tests together that share a fixture.
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``long`` or ``model`` start first, so that none is left over for one core in the end."""
    items.sort(key=lambda item: not any(item.get_closest_marker(mark) for mark in ("long", "model")))


@pytest.fixture(scope="session")
def tiny_config():
    """Factory ``tiny_config(layers=2, heads=4, kv_heads=2, head_dim=16, ...) -> LlamaConfig``."""
    return make_tiny_config


@pytest.fixture(scope="session")
def tiny_model():
    """Factory ``tiny_model(config=None, *, seed=0, dtype=float32, layers=2, heads=4, ...) -> model``."""
    return make_tiny_model


@pytest.fixture(scope="session")
def family():
    """``family(name) -> config`` of a tiny model."""
    return family_config


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """The character tokenizer that goes with the tiny models."""
    return make_tiny_tokenizer()


@pytest.fixture
def tiny_checkpoint(tmp_path):
    """Factory ``tiny_checkpoint(model=None, name="tiny", **settings) -> Path``: a saved model with its tokenizer."""

    def save(model=None, name: str = "tiny", **settings) -> Path:
        model = model if model is not None else make_tiny_model(**settings)
        folder = tmp_path / name
        model.save_pretrained(folder)
        make_tiny_tokenizer().save_pretrained(folder)
        return folder

    return save


@pytest.fixture(autouse=True)
def _own_answers(tmp_path, monkeypatch):
    """Answers of evaluations stay with their test."""
    monkeypatch.setattr("kvq.eval.settings.cache_root", lambda: tmp_path / "kvq-cache")


@pytest.fixture(scope="session")
def stats_of():
    """Factory ``stats_of(folder, windows=None) -> Stats``: statistics over token windows, by default random ones."""
    from kvq.calib.collect import collect
    from kvq.models.resolve import load_model, weights_fingerprint

    def measure(folder: Path, windows: torch.Tensor | None = None):
        if windows is None:
            windows = torch.randint(3, 100, (4, 64), generator=torch.Generator().manual_seed(0))
        return collect(load_model(folder), windows, weights_fingerprint=weights_fingerprint(folder))

    return measure


@pytest.fixture(scope="session")
def large_keys():
    """Factory ``large_keys(folder, out, factor) -> Path``: the same Llama with keys ``factor`` times as large.

    Key projections are scaled and query projections inversely, so every score, and every logit, stays as it was; with a
    power of two not a bit of the weights' digits changes.
    """
    from safetensors.torch import load_file, save_file

    def make(folder: Path, out: Path, factor: float) -> Path:
        shutil.copytree(folder, out)
        for file in out.glob("*.safetensors"):
            tensors = load_file(file)
            for name, tensor in tensors.items():
                if ".k_proj." in name:
                    tensors[name] = tensor * factor
                elif ".q_proj." in name:
                    tensors[name] = tensor / factor
            save_file(tensors, file, metadata={"format": "pt"})
        return out

    return make


@pytest.fixture(scope="session")
def builtin_dir() -> Path:
    """The embedded real model as a checkpoint folder (converted on first use)."""
    from kvq.errors import ModelNotFoundError
    from kvq.models.builtin import builtin_model_dir

    try:
        return builtin_model_dir()
    except ModelNotFoundError as error:
        pytest.skip(str(error))
