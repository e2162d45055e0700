"""A model's description names every layer's cache, and models without a plain KV cache are refused with the reason."""

import pytest
import torch
from transformers import (
    BertConfig,
    DeepseekV3Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen2Config,
    T5Config,
)

from kvq.errors import UnsupportedModelError
from kvq.models.describe import describe

SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen2Config])
def test_plain_decoders_are_full_everywhere(config_class):
    spec = describe(config_class(**SMALL, max_position_embeddings=777))
    assert [layer.kind for layer in spec.layers] == ["full"] * 6
    assert {(layer.kv_heads, layer.head_dim, layer.window) for layer in spec.layers} == {(2, 32, None)}
    assert (spec.num_heads, spec.hidden_size, spec.vocab_size, spec.max_length) == (4, 64, 128, 777)


def test_head_dim_defaults_to_hidden_size_over_heads():
    settings = {name: value for name, value in SMALL.items() if name != "head_dim"}
    assert describe(LlamaConfig(**settings)).layers[0].head_dim == 16


def test_hybrid_layers_follow_the_layer_types():
    kinds = ["sliding_attention", "full_attention"] * 3
    spec = describe(Gemma3TextConfig(**SMALL, layer_types=kinds, sliding_window=48))
    assert [layer.kind for layer in spec.layers] == ["sliding", "full"] * 3
    assert [layer.window for layer in spec.layers] == [48, None] * 3
    assert [layer.index for layer in spec.full_layers] == [1, 3, 5]


def test_layers_that_read_anothers_cache_have_none():
    kinds = ["sliding_attention", "full_attention"] * 3
    config = Gemma3nTextConfig(
        **SMALL, layer_types=kinds, sliding_window=48, num_kv_shared_layers=2, vocab_size_per_layer_input=128
    )
    spec = describe(config)
    assert [layer.index for layer in spec.full_layers] == [1, 3]
    assert all(layer.kind != "full" for layer in spec.layers[4:])


def test_fingerprint_is_of_the_shape_not_of_the_dtype(tiny_config):
    base = describe(tiny_config())
    assert describe(tiny_config(dtype=torch.bfloat16)).fingerprint == base.fingerprint
    assert describe(tiny_config(layers=3)).fingerprint != base.fingerprint
    assert describe(tiny_config(kv_heads=1)).fingerprint != base.fingerprint


DEEPSEEK = DeepseekV3Config(**{**SMALL, "head_dim": 32}, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=16)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MambaConfig(num_hidden_layers=2, hidden_size=64), "no KV cache"),
        (BertConfig(architectures=["BertModel"]), "not a causal language model"),
        (T5Config(), "encoder-decoder"),
        (DEEPSEEK, "MLA latents"),
        (MistralConfig(**SMALL, sliding_window=64), "only a sliding window"),
        (LlamaConfig(**{**SMALL, "head_dim": 24}), "head_dim=24, which is no multiple of 16"),
    ],
    ids=["mamba", "bert", "t5", "deepseek", "sliding", "odd-head"],
)
def test_models_that_cannot_be_quantized_are_refused_with_the_reason(config, reason):
    with pytest.raises(UnsupportedModelError, match=reason) as error:
        describe(config)
    assert "\n" not in str(error.value)
