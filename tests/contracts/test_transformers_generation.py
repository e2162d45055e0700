"""What kvq relies on of ``generate`` and of a model's forward (``kvq/integrations/runtime.py``)."""

import copy
import functools
import inspect
import pickle

import torch
from transformers import DynamicCache, GenerationConfig, GenerationMixin


def test_the_hook_that_builds_the_cache():
    """An instance attribute of this name is called in its place, with these arguments in this order."""
    parameters = list(inspect.signature(GenerationMixin._prepare_cache_for_generation).parameters)
    assert parameters[:3] == ["self", "generation_config", "model_kwargs"]


def _prepared(seen, model, generation_config, model_kwargs, *args, **kwargs):
    result = type(model)._prepare_cache_for_generation(model, generation_config, model_kwargs, *args, **kwargs)
    seen.append(type(model_kwargs.get("past_key_values")))
    return result


def test_generate_asks_the_instance_for_its_cache(tiny_model):
    model, seen = tiny_model(), []
    model._prepare_cache_for_generation = functools.partial(_prepared, seen, model)
    model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=2, do_sample=False)
    assert seen == [DynamicCache]


def _noted(model):
    return id(model)


def test_a_partial_on_the_model_survives_copies_and_pickles(tiny_model):
    model = tiny_model()
    model.note = functools.partial(_noted, model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.note() == id(other) != id(model)


def test_generation_config_names_no_private_cache():
    config = GenerationConfig()
    assert config.cache_implementation in (None, "dynamic")
    assert hasattr(config, "is_assistant")


def test_a_pre_hook_on_the_decoder_can_give_it_a_cache(tiny_model):
    """Plain calls build no cache through ``generate``: the decoder's keyword arguments are changed by a hook."""
    model, cache = tiny_model(), DynamicCache()

    def give(module, args, kwargs):
        assert "past_key_values" in kwargs or kwargs.get("use_cache") is None or kwargs["use_cache"] is not None
        return args, {**kwargs, "past_key_values": cache, "use_cache": True}

    handle = model.get_decoder().register_forward_pre_hook(give, with_kwargs=True)
    model(torch.tensor([[3, 4, 5]]))
    handle.remove()
    assert cache.get_seq_length() == 3


def test_positions_are_passed_by_name(tiny_model):
    """Keys that are stored before RoPE need the positions that the decoder is given."""
    model, seen = tiny_model(), []
    model.get_decoder().register_forward_pre_hook(lambda m, a, k: seen.append(set(k)), with_kwargs=True)
    model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=2, do_sample=False)
    assert all({"input_ids", "past_key_values"} <= names for names in seen)
    assert any("position_ids" in names or "attention_mask" in names for names in seen)
