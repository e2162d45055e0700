"""What kvq relies on of rotary modules (``kvq/models/rope.py``)."""

import inspect

import pytest
import torch
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.llama import modeling_llama
from transformers.models.qwen2 import modeling_qwen2


def test_a_model_type_leads_to_its_file():
    assert model_type_to_module_name("gemma3_text") == "gemma3"


@pytest.mark.parametrize("code", [modeling_llama, modeling_qwen2])
def test_a_file_has_one_rotary_class_and_one_function_to_apply_it(code):
    classes = [name for name in vars(code) if name.endswith("RotaryEmbedding")]
    assert len(classes) == 1
    assert list(inspect.signature(code.apply_rotary_pos_emb).parameters)[:4] == ["q", "k", "cos", "sin"]


def test_cos_and_sin_of_positions(tiny_config):
    """forward(x, position_ids) gives cos and sin [B, T, channels], in halves, cos 1 and sin 0 at position 0."""
    rotary = modeling_llama.LlamaRotaryEmbedding(config=tiny_config(head_dim=16))
    cos, sin = rotary(torch.zeros(1, 1), torch.arange(5).unsqueeze(0))
    assert cos.shape == sin.shape == (1, 5, 16)
    assert torch.equal(cos[0, 0], torch.ones(16))
    assert torch.equal(sin[0, 0], torch.zeros(16))
    assert torch.equal(cos[..., :8], cos[..., 8:])


def test_the_inverse_is_the_rotation_by_minus_sin(tiny_config):
    rotary = modeling_llama.LlamaRotaryEmbedding(config=tiny_config(head_dim=16))
    cos, sin = rotary(torch.zeros(1, 1), torch.arange(5).unsqueeze(0))
    x = torch.randn(1, 2, 5, 16)
    there = modeling_llama.apply_rotary_pos_emb(x, x, cos, sin)[1]
    back = modeling_llama.apply_rotary_pos_emb(there, there, cos, -sin)[1]
    assert torch.allclose(back, x, atol=1e-5)


def test_parameters_are_under_this_name(tiny_config):
    assert tiny_config().rope_parameters["rope_type"] == "default"
