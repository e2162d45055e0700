"""Versions of a checkpoint in one forward give what each gives alone, and no more than a tensor is in memory."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvq.exporting import versions
from kvq.exporting.versions import CannotStream, logits_of_versions
from kvq.models.stored import tensors_of

CHANGED = ("self_attn.v_proj.weight", "self_attn.q_proj.bias", "self_attn.k_norm.weight")


def tiny(family: str, **settings):
    """A random model of a family; settings that it does not have are left out by its config."""
    config = AutoConfig.for_model(
        family, vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, pad_token_id=0, max_position_embeddings=64, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def scaled(name, tensor):
    return tensor, tensor * 1.25, tensor * 0.5


def alone(model, tokens, changed):
    """Logits of each version, one model after the other."""
    found = []
    for number in range(3):
        for name, parameter in model.named_parameters():
            if name in changed:
                parameter.data.copy_(changed[name][number])
        found.append(model(input_ids=tokens, use_cache=False).logits)
    return torch.stack(found)


@pytest.mark.parametrize("block", [1 << 20, 100])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2", "phi3"])
@torch.no_grad()
def test_all_versions_at_once_are_each_alone(family, block, tmp_path, monkeypatch):
    monkeypatch.setattr(versions, "BLOCK", block)
    model = tiny(family)
    model.save_pretrained(tmp_path)
    names = {n for n in tensors_of(tmp_path) if n.endswith(CHANGED) or "qkv_proj" in n}
    assert names
    tokens = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(1))
    found = logits_of_versions(tmp_path, tokens, frozenset(names), scaled, 3)
    changed = {name: scaled(name, p.data.clone()) for name, p in model.named_parameters() if name in names}
    exact = alone(model, tokens, changed)
    assert found.shape == exact.shape
    assert float((found - exact).abs().max() / exact.abs().max()) < 1e-5
    # Control: the versions are not the same.
    assert float((exact[0] - exact[1]).abs().max() / exact.abs().max()) > 1e-3


@pytest.mark.parametrize("shape", [(51,), (3, 51), (2, 3, 51), (0, 51), (2, 0, 51)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_by_blocks_is_the_layer(shape, bias, monkeypatch):
    """Any batch that a model's code may give it, experts without a token included."""
    monkeypatch.setattr(versions, "BLOCK", 4 * 51)
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(51, 13, bias=bias).requires_grad_(False), torch.randn(shape)
    found = versions._linear(layer.weight, layer.bias, x)
    assert found.shape == (*shape[:-1], 13)
    assert found.is_contiguous()
    assert torch.allclose(found.double(), layer.double()(x.double()), atol=1e-5)


@torch.no_grad()
def test_tied_embeddings_in_16_bits_are_looked_up_and_multiplied(tmp_path):
    model = tiny("llama", tie_word_embeddings=True).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in tensors_of(tmp_path)
    tokens = torch.arange(3, 14).view(1, -1)
    found = logits_of_versions(tmp_path, tokens, frozenset(), scaled, 2)
    exact = model.float()(input_ids=tokens, use_cache=False).logits
    assert float((found - exact).abs().max() / exact.abs().max()) < 1e-5


def test_no_whole_model_is_in_memory(tmp_path, monkeypatch):
    """At no time do the modules hold more than one module's tensors."""
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    seen, holding = [], versions._holding

    def watched(module, weights):
        assert all(p.is_meta for p in module._parameters.values() if p is not None)
        seen.append(sum(w.numel() for w in weights.values()))
        return holding(module, weights)

    monkeypatch.setattr(versions, "_holding", watched)
    logits_of_versions(tmp_path, torch.arange(3, 8).view(1, -1), frozenset(), scaled, 2)
    assert max(seen) == 128 * 64  # the embeddings, and these are the file's own pages


@pytest.mark.parametrize("what", ["shape", "name", "dtype"])
def test_a_checkpoint_of_other_tensors_cannot_be_streamed(what, tmp_path):
    from safetensors.torch import load_file, save_file

    tiny("llama").save_pretrained(tmp_path)
    file, name = tmp_path / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(file)
    weight = tensors.pop(name)
    if what == "name":
        tensors["model.layers.1.mlp.other.weight"] = weight
    else:
        tensors[name] = weight[:1] if what == "shape" else weight.to(torch.float8_e4m3fn)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CannotStream, match=r"no tensor of the name and shape of 'model.layers.1.mlp.up_proj.weight'"):
        logits_of_versions(tmp_path, torch.arange(3, 8).view(1, -1), frozenset(), scaled, 2)


def test_readers_of_another_layers_keys_cannot_be_streamed(tmp_path):
    config = AutoConfig.for_model(
        "gemma3n_text", vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=16,
        num_attention_heads=2, num_key_value_heads=1, num_kv_shared_layers=1, vocab_size_per_layer_input=128,
        hidden_size_per_layer_input=8, laurel_rank=4, layer_types=["full_attention"] * 2, pad_token_id=0,
        activation_sparsity_pattern=[0.0, 0.0],
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(CannotStream, match="read the keys and values of another"):
        logits_of_versions(tmp_path, torch.arange(3, 8).view(1, -1), frozenset(), scaled, 2)


def test_tensors_that_are_renamed_as_they_are_loaded_cannot_be_streamed(tmp_path):
    tiny("gpt_neox").save_pretrained(tmp_path)
    with pytest.raises(CannotStream, match=r"no tensor of the name and shape of 'lm_head.weight'"):
        logits_of_versions(tmp_path, torch.arange(3, 8).view(1, -1), frozenset(), scaled, 2)
