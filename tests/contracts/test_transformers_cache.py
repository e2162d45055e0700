"""What kvq relies on of transformers' caches (``kvq/cache/layer.py``, ``kvq/models/describe.py``)."""

import inspect

import pytest
import torch
from transformers import DynamicCache, Gemma3TextConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer


def test_a_cache_is_a_list_of_layers_by_type():
    """``describe`` reads which layers are full and which slide from the cache that transformers builds."""
    config = Gemma3TextConfig(
        num_hidden_layers=3, sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    layers = DynamicCache(config=config).layers
    assert [type(layer) for layer in layers] == [DynamicSlidingWindowLayer, DynamicLayer, DynamicSlidingWindowLayer]
    assert layers[0].sliding_window == 16


def test_layers_can_be_replaced_in_place(tiny_config):
    cache = DynamicCache(config=tiny_config(layers=2))
    cache.layers[1] = DynamicLayer()
    assert cache.get_seq_length(1) == 0


@pytest.mark.parametrize(
    "name",
    [
        "lazy_initialization", "update", "get_mask_sizes", "get_seq_length", "reset", "reorder_cache", "crop",
        "batch_repeat_interleave", "batch_select_indices", "offload", "prefetch",
    ],
)  # fmt: skip
def test_a_layer_has_the_members_that_a_packed_layer_overrides(name):
    assert callable(getattr(DynamicLayer, name))
    assert issubclass(DynamicLayer, CacheLayerMixin)


def test_update_stores_and_returns_what_attention_reads():
    """Shapes [batch, kv_heads, length, head_dim]; mask sizes are asked before, and equal what update returns."""
    layer = DynamicLayer()
    x = torch.randn(1, 2, 5, 8)
    layer.update(x, x)
    assert tuple(layer.get_mask_sizes(3)) == (8, 0)
    keys, values = layer.update(x[:, :, :3], x[:, :, :3])
    assert keys.shape == values.shape == (1, 2, 8, 8)
    assert layer.get_seq_length() == 8


def test_crop_takes_a_negative_number_of_tokens():
    layer = DynamicLayer()
    layer.update(torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8))
    layer.crop(-2)
    assert layer.get_seq_length() == 3


def test_keys_and_values_come_first_in_update():
    assert list(inspect.signature(DynamicCache.update).parameters)[1:4] == ["key_states", "value_states", "layer_idx"]
    assert list(inspect.signature(DynamicLayer.update).parameters)[1:3] == ["key_states", "value_states"]
