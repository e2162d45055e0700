"""Where attention is, told from tensor names; and which layers read another layer's cache."""

import pytest
from transformers import Gemma3nTextConfig, LlamaConfig

from kvq.errors import UnsupportedModelError
from kvq.models.names import attention_modules, shared_layers


def names(prefix: str, *projections: str, layers: int = 2) -> list[str]:
    return [f"{prefix.format(i)}.{projection}" for i in range(layers) for projection in projections]


@pytest.mark.parametrize(
    ("tensors", "module"),
    [
        (names("model.layers.{}.self_attn", "k_proj.weight", "v_proj.weight"), "model.layers.1.self_attn"),
        (names("model.layers.{}.self_attn", "k_proj.qweight", "k_proj.scales"), "model.layers.1.self_attn"),
        (names("model.layers.{}.self_attn", "qkv_proj.weight"), "model.layers.1.self_attn"),
        (names("backbone.layers.{}.mixer", "k_proj.weight"), "backbone.layers.1.mixer"),
        (names("transformer.h.{}.attn", "c_attn.weight"), "transformer.h.1.attn"),
        (names("gpt_neox.layers.{}.attention", "query_key_value.bias"), "gpt_neox.layers.1.attention"),
        (
            names("model.language_model.layers.{}.self_attn", "k_proj.weight")
            + names("model.vision_tower.encoder.layers.{}.self_attn", "k_proj.weight")
            + names("mtp.layers.{}.self_attn", "k_proj.weight"),
            "model.language_model.layers.1.self_attn",
        ),
    ],
)
def test_the_module_of_a_layer(tensors, module):
    assert attention_modules(tensors, [1]) == {1: module}


def test_only_wanted_layers_must_have_attention():
    tensors = [*names("model.layers.{}.linear_attn", "in_proj.weight"), "model.layers.2.self_attn.k_proj.weight"]
    assert attention_modules(tensors, [2]) == {2: "model.layers.2.self_attn"}
    with pytest.raises(UnsupportedModelError, match=r"layer 1.*found none"):
        attention_modules(tensors, [1, 2])


def test_two_modules_in_one_layer_are_refused():
    tensors = [f"model.layers.0.{module}.k_proj.weight" for module in ("self_attn", "cross_attn")]
    with pytest.raises(UnsupportedModelError, match="several"):
        attention_modules(tensors, [0])


def test_readers_and_owners():
    """A reader takes the last layer of its own type before the sharing begins, as transformers says."""
    config = Gemma3nTextConfig(
        num_hidden_layers=8, num_kv_shared_layers=3, activation_sparsity_pattern=None,
        layer_types=["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    assert shared_layers(config) == {5: 4, 6: 4, 7: 3}
    modes = getattr(config, "kv_sharing_modes", None)
    if modes is not None:
        assert {i for i, mode in enumerate(modes) if mode == "store"} == {3, 4}
        assert {i for i, mode in enumerate(modes) if mode == "reuse"} == {5, 6, 7}
    assert shared_layers(LlamaConfig()) == {}
