"""What kvq relies on of the attention interface (``kvq/cache/model_attention.py``, ``two_view.py``)."""

import inspect

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "kvq_contract"
SEEN = []


def attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    SEEN.append((module, query, key, value, attention_mask, scaling, kwargs))
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


@pytest.fixture
def model(tiny_model):
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    SEEN.clear()
    model = tiny_model(layers=1, heads=4, kv_heads=2, head_dim=16)
    model.set_attn_implementation(NAME)
    return model


def test_a_registered_function_is_called_with_these_arguments(model):
    """query [B, Hq, L, D], key and value [B, Hkv, T, D] with heads not repeated; output [B, L, Hq, D]."""
    assert model.config._attn_implementation == NAME
    model(torch.tensor([[3, 4, 5]]))
    ((module, query, key, value, mask, scaling, _),) = SEEN
    assert (query.shape, key.shape, value.shape) == ((1, 4, 3, 16), (1, 2, 3, 16), (1, 2, 3, 16))
    assert module.layer_idx == 0
    assert module.num_key_value_groups == 2
    assert scaling == pytest.approx(0.25)
    assert mask is None


def test_padding_arrives_as_a_boolean_mask(model):
    """[B, 1, L, T], True to attend; without the mask's registration it would be None and pads would be attended."""
    padding = torch.tensor([[0, 1, 1], [1, 1, 1]])
    model(torch.tensor([[2, 4, 5], [3, 4, 5]]), attention_mask=padding)
    mask = SEEN[0][4]
    assert mask.dtype == torch.bool
    assert mask.shape[-2:] == (3, 3)
    assert mask[0, 0].tolist() == [[False] * 3, [False, True, False], [False, True, True]]


def test_an_attribute_of_the_keys_that_update_returns_arrives(model):
    """Packed storage reaches the attention function as an attribute of the key tensor."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class Marking(DynamicLayer):
        def update(self, key_states, value_states, *args, **kwargs):
            keys, values = super().update(key_states, value_states, *args, **kwargs)
            keys.kvq_contract = "here"
            return keys, values

    cache = DynamicCache(config=model.config)
    cache.layers[0] = Marking()
    model(torch.tensor([[3, 4, 5]]), past_key_values=cache)
    assert SEEN[0][2].kvq_contract == "here"


def test_the_choice_can_be_changed_and_is_not_saved(model, tmp_path):
    model.set_attn_implementation("sdpa")
    model(torch.tensor([[3, 4, 5]]))
    assert not SEEN
    model.set_attn_implementation(NAME)
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()


def test_functions_are_looked_up_for_every_call(model):
    """Calibration watches queries by answering the look-up with a function of its own."""
    own = AttentionInterface.get_interface
    assert next(iter(inspect.signature(own).parameters)) == "self"
    called = []

    def lookup(self, *args, **kwargs):
        called.append(args)
        return own(self, *args, **kwargs)

    AttentionInterface.get_interface = lookup
    try:
        model(torch.tensor([[3, 4, 5]]))
    finally:
        AttentionInterface.get_interface = own
    assert called


def test_flags_that_tell_a_default_from_a_choice(model):
    assert model._supports_sdpa is True
    assert isinstance(model._supports_attention_backend, bool)
