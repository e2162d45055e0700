"""Tiny configs of families that differ in what calibration sees."""

import pytest
from transformers import CONFIG_MAPPING, PretrainedConfig

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


@pytest.fixture(scope="session")
def family():
    """``family(name) -> config`` of a tiny model."""
    return family_config
