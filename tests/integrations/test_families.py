"""Model families: the right layers are packed, and packed attention equals attention over the dequantized cache.

The reference is the model's own eager attention on the tensors that the cache dequantizes, so softcap, sink logits,
sliding layers, biases and norms are the model's own code. Only the first layer is packed: rounding of 1e-7 before a
second one would now and then turn a 2-bit code over, and hide everything else.
"""

import pytest
import torch
from transformers import AutoConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvq.cache import PackedLayer, packed_layers
from kvq.integrations.runtime import new_cache, quantized_cache
from kvq.models.decoder import decoder_of
from kvq.recipe import load_recipe

COMMON = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "initializer_range": 0.15,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
HYBRID = {
    "num_hidden_layers": 2,
    "sliding_window": 24,
    "layer_types": ["full_attention", "sliding_attention"],
}
FAMILIES = {
    "llama": COMMON,
    "qwen2": {k: v for k, v in COMMON.items() if k != "head_dim"} | {"hidden_size": 128},
    "qwen3": COMMON,
    "mistral": COMMON | {"sliding_window": None},
    "gemma2": COMMON | HYBRID | {"query_pre_attn_scalar": 32, "attn_logit_softcapping": 2.0},
    "gemma3_text": COMMON | HYBRID | {"query_pre_attn_scalar": 32},
    "gpt_oss": COMMON | HYBRID | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phi3": {k: v for k, v in COMMON.items() if k != "head_dim"} | {"hidden_size": 128, "partial_rotary_factor": 0.5},
    "gpt_neox": {
        "vocab_size": 128,
        "hidden_size": 128,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "initializer_range": 0.15,
    },
    "gpt2": {"vocab_size": 128, "n_embd": 128, "n_layer": 1, "n_head": 4, "initializer_range": 0.15},
}


@pytest.fixture(params=sorted(FAMILIES))
def model(request, tiny_model):
    return tiny_model(AutoConfig.for_model(request.param, **FAMILIES[request.param]), dtype=torch.float32, seed=2)


def logits_by_steps(model, ids):
    cache, out = new_cache(model), []
    with torch.no_grad():
        out.append(model(ids[:, :40], past_key_values=cache).logits)
        for part in (ids[:, 40:70], *ids[:, 70:].split(1, dim=1)):
            out.append(model(part, past_key_values=cache).logits)
    return torch.cat(out, dim=1), cache


def test_packed_attention_equals_the_models_own_attention_over_the_dequantized_cache(model):
    ids = torch.randint(3, 128, (2, 120), generator=torch.Generator().manual_seed(0))
    recipe = load_recipe("kivi2").override({"tokens.window": 32, "tokens.sinks": 2})
    with quantized_cache(model, recipe):
        packed, cache = logits_by_steps(model, ids)
        assert all(layer.reads_handle for layer in packed_layers(cache))
        model.set_attn_implementation("eager")
        dense, other = logits_by_steps(model, ids)
        assert not any(layer.reads_handle for layer in packed_layers(other))
    plain = model(ids).logits
    span = dense.abs().max()
    assert (packed - dense).abs().max() < 1e-5 * span
    assert (packed - plain).abs().max() > 1e-2 * span


def test_full_layers_are_packed_and_sliding_layers_stay_exact(model):
    with quantized_cache(model, "int4"):
        layers = new_cache(model).layers
    kinds = getattr(model.config, "layer_types", None)
    sliding = [kind == "sliding_attention" for kind in kinds] if kinds else [False] * len(layers)
    assert [isinstance(layer, DynamicSlidingWindowLayer) for layer in layers] == sliding
    assert [isinstance(layer, PackedLayer) for layer in layers] == [not s for s in sliding]
    assert not any(type(layer) is DynamicLayer for layer in layers)


def test_generation_runs_on_every_family(model):
    ids = torch.randint(3, 128, (1, 60), generator=torch.Generator().manual_seed(1))
    with quantized_cache(model, "kivi4"):
        out = model.generate(ids, max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert out.shape == (1, 90)
    assert decoder_of(model) is not model
