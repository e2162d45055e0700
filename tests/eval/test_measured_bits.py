import pytest
import torch

from kvq.cache import cache_nbytes, make_plan
from kvq.eval.measured_bits import measured_bits
from kvq.integrations import runtime
from kvq.models.describe import describe
from kvq.recipe import load_recipe


@pytest.mark.parametrize("name", ["fp16", "int4", "int8", "kivi4", "kivi2"])
@pytest.mark.parametrize("tokens", [77, 700])
def test_measured_bits_are_the_bytes_of_a_cache_that_the_model_filled(tiny_model, name, tokens):
    model = tiny_model(dtype=torch.bfloat16, heads=2, kv_heads=1, head_dim=32)
    plan = make_plan(load_recipe(name), describe(model.config))
    runtime.install(model, plan)
    try:
        cache = runtime.new_cache(model)
        with torch.inference_mode():
            model(torch.full((1, tokens), 7), past_key_values=cache)
    finally:
        runtime.uninstall(model)
    elements = 2 * 2 * tokens * 32
    assert plan.elements(tokens) == elements
    assert measured_bits(plan, tokens, torch.bfloat16) == 8 * cache_nbytes(cache) / elements


def test_exact_layers_count_at_the_cache_dtype(tiny_model):
    model = tiny_model(layers=2)
    exact = {"key": {"codec": "exact"}, "value": {"codec": "exact"}}
    half = load_recipe("int4").override({"layers.0.key.codec": "exact", "layers.0.value.codec": "exact"})
    assert half.layers["0"] == exact
    plan = make_plan(half, describe(model.config))
    whole = make_plan(load_recipe("int4"), describe(model.config))
    for dtype, bits in ((torch.float32, 32), (torch.bfloat16, 16)):
        assert measured_bits(plan, 640, dtype) == pytest.approx((bits + measured_bits(whole, 640, dtype)) / 2)
        assert measured_bits(make_plan(load_recipe("fp16"), describe(model.config)), 640, dtype) == bits


def test_a_long_cache_approaches_the_asymptotic_bits(tiny_model):
    plan = make_plan(load_recipe("kivi2"), describe(tiny_model(heads=2, kv_heads=1, head_dim=64).config))
    short, long = (measured_bits(plan, tokens, torch.bfloat16) for tokens in (512, 16384))
    assert plan.bits_per_element == 3
    assert 3 < long < 3.2 < 5 < short
