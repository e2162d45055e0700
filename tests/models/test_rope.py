"""Rotating back: keys before RoPE are found again, in the layout of the model's own code."""

import pytest
import torch
from transformers import CONFIG_MAPPING

from kvq.errors import UnsupportedModelError
from kvq.models.rope import rope_of

DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 128}


def config(model_type, **settings):
    return CONFIG_MAPPING[model_type](num_hidden_layers=2, **{**SIZES, **settings})


def keys(channels=32, tokens=9, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 2, tokens, channels, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text", "mistral", "olmo2", "gpt_oss"])
def test_halves_rotate_by_position_times_frequency(model_type):
    """Against the definition: the pair (j, j + d/2) turns by t * theta^(-2j/d)."""
    layers = {"layer_types": ["sliding_attention", "full_attention"]} if model_type == "gemma3_text" else {}
    # gpt_oss, whose cos has one number a pair, comes with YaRN.
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}} if model_type == "gpt_oss" else {}
    own = config(model_type, head_dim=32, **layers, **plain)
    found = rope_of(own)
    theta = own.rope_parameters
    theta = (theta.get("full_attention") or theta)["rope_theta"]
    x, positions = keys(), torch.tensor([[0, 1, 2, 5, 6, 100, 101, 102, 4000]])
    angle = positions[0].double().unsqueeze(1) * theta ** (-torch.arange(0, 32, 2).double() / 32)
    pairs = torch.complex(x[..., :16], x[..., 16:]) * torch.polar(torch.ones_like(angle), angle)
    expected = torch.cat([pairs.real, pairs.imag], dim=-1)
    assert torch.allclose(found.rotate(x, positions), expected, atol=2e-3)
    assert torch.allclose(found.inverse(found.rotate(x, positions), positions), x, atol=1e-5)
    assert not torch.allclose(found.inverse(found.rotate(x, positions), positions + 1), x, atol=1e-2)


@pytest.mark.parametrize(("model_type", "settings"), [("glm4", {"head_dim": 32}), ("stablelm", {}), ("phi3", {})])
def test_partial_and_interleaved_rotations_leave_the_other_channels(model_type, settings):
    own = config(model_type, pad_token_id=0, **settings)
    own.rope_parameters["partial_rotary_factor"] = 0.5
    found = rope_of(own)
    x, positions = keys(), torch.arange(9).unsqueeze(0)
    rotated = found.rotate(x, positions)
    assert found.channels == 16
    assert torch.equal(rotated[..., 16:], x[..., 16:])
    assert not torch.allclose(rotated[..., :16], x[..., :16], atol=1e-2)
    assert torch.allclose(found.inverse(rotated, positions), x, atol=1e-5)


def test_the_attention_factor_of_yarn_is_divided_out():
    yarn = {"rope_type": "yarn", "factor": 8.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    found = rope_of(config("llama", head_dim=32, rope_parameters=yarn, max_position_embeddings=512))
    x, positions = keys(), torch.arange(9).unsqueeze(0)
    assert found.factor > 1.1
    assert torch.allclose(found.inverse(found.rotate(x, positions), positions), x, atol=1e-5)


def test_positions_differ_by_row():
    found = rope_of(config("llama", head_dim=32))
    x, positions = keys(), torch.stack([torch.arange(9), torch.arange(9) + 40])
    both = found.rotate(x, positions)
    assert torch.equal(both[1:], found.rotate(x[1:], positions[1:]))
    assert not torch.allclose(both[1:], found.rotate(x[1:], positions[:1]), atol=1e-2)


@pytest.mark.parametrize(
    ("model_type", "settings", "reason"),
    [
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "changes frequencies",
        ),
        ("gpt2", {}, "no rotary embedding"),
    ],
)
def test_models_whose_keys_cannot_be_taken_back_are_refused(model_type, settings, reason):
    own = CONFIG_MAPPING[model_type](**settings)
    with pytest.raises(UnsupportedModelError, match=reason):
        rope_of(own)
