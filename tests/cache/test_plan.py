"""Byte law: what a plan predicts is what a filled cache holds; and recipes resolve by layer and head."""

import re

import pytest
import torch
from transformers import DynamicCache, LlamaConfig

from kvq.cache import cache_nbytes, make_plan, pack_cache
from kvq.calib.artefacts import needed_artefacts, stand_in_artefacts
from kvq.errors import RecipeError
from kvq.models.describe import describe
from kvq.recipe import load_recipe, parse_recipe


def filled(config, plan, tokens, dtype=torch.bfloat16):
    cache = DynamicCache(config=config)
    pack_cache(cache, plan)
    for i in range(config.num_hidden_layers):
        x = torch.randn(1, config.num_key_value_heads, tokens, config.head_dim, dtype=dtype)
        cache.update(x, x, i)
    return cache


@pytest.mark.parametrize("recipe", ["fp16", "int8", "int4", "kivi4", "kivi2"])
@pytest.mark.parametrize("tokens", [512, 2001, 8192])
def test_predicted_bytes_are_measured_bytes(tiny_config, recipe, tokens):
    config = tiny_config(head_dim=64, layers=3)
    plan = make_plan(load_recipe(recipe), describe(config))
    measured = cache_nbytes(filled(config, plan, tokens))
    assert measured == pytest.approx(plan.predicted_bytes(tokens, 2), rel=0.03)


def test_measured_bits_approach_the_asymptotic_bits(tiny_config):
    config = tiny_config(head_dim=64)
    plan = make_plan(load_recipe("kivi2"), describe(config))
    assert plan.bits_per_element == 3.0
    bits = 8 * cache_nbytes(filled(config, plan, 32768)) / plan.elements(32768)
    assert 3.0 < bits < 3.1


def test_bytes_stay_true_while_decoding(tiny_config):
    config = tiny_config(head_dim=64)
    plan = make_plan(load_recipe("kivi2"), describe(config))
    cache = filled(config, plan, 3000)
    for _ in range(200):
        for i in range(config.num_hidden_layers):
            x = torch.randn(1, 2, 1, 64, dtype=torch.bfloat16)
            cache.update(x, x, i)
        assert cache_nbytes(cache) == pytest.approx(plan.predicted_bytes(cache.get_seq_length(), 2), rel=0.03)


def test_overrides_by_layer_and_head_make_groups(tiny_config):
    recipe = load_recipe("kivi2").override({"layers.0.key.bits": 4, "layers.-1/1.value.bits": 8})
    plan = make_plan(recipe, describe(tiny_config(layers=3, head_dim=32)))
    assert [len(plan.layers[i]) for i in range(3)] == [1, 1, 2]
    assert plan.layers[0][0].codecs["key"].bits == 4
    assert plan.layers[1][0].codecs["key"].bits == 2
    by_heads = {group.heads: group.codecs["value"].bits for group in plan.layers[2]}
    assert by_heads == {(0,): 2, (1,): 8}


def test_exact_layers_keep_the_plain_cache(tiny_config):
    recipe = load_recipe("kivi2").override({"layers.1.key.codec": "exact", "layers.1.value.codec": "exact"})
    plan = make_plan(recipe, describe(tiny_config(layers=3, head_dim=32)))
    assert sorted(plan.layers) == [0, 2]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"value.group": 24}, "group=24 does not divide head_dim=32"),
        ({"layers.9.key.bits": 4}, "matches nothing"),
        ({"layers.0/7.key.bits": 4}, "matches nothing"),
    ],
)
def test_impossible_plans_name_value_and_rule(tiny_config, settings, words):
    with pytest.raises(RecipeError, match=words):
        make_plan(load_recipe("kivi2").override(settings), describe(tiny_config(head_dim=32)))


def test_calibrated_scales_are_required_and_used(tiny_config):
    spec = describe(tiny_config(head_dim=32))
    with pytest.raises(RecipeError, match="kvq calibrate"):
        make_plan(load_recipe("fp8"), spec)
    scales = {f"layers.{i}.{side}.scale": 0.25 for i in range(2) for side in ("key", "value")}
    assert make_plan(load_recipe("fp8"), spec, scales).layers[1][0].codecs["key"].scale == 0.25


def test_heads_with_scales_of_their_own_are_groups_of_one(tiny_config):
    """granularity head: each KV head is stored with its own number of the artefact."""
    recipe = load_recipe("fp8").override({"key.granularity": "head", "value.granularity": "head"})
    spec = describe(tiny_config(layers=1, heads=4, kv_heads=2))
    needed = needed_artefacts(recipe, spec)
    assert {own.shape for own in needed.values()} == {(2,)}
    plan = make_plan(recipe, spec, {name: torch.tensor([0.5, 0.25], dtype=torch.float64) for name in needed})
    assert [(group.heads, group.codecs["key"].scale) for group in plan.layers[0]] == [((0,), 0.5), ((1,), 0.25)]


def test_scales_of_heads_stay_with_their_heads_in_a_layer_of_two_groups(tiny_config):
    """Heads that an override treats differently are fitted, named and stored by group, whatever the order of heads."""
    recipe = load_recipe("fp8").override({"key.granularity": "head", "layers.0/1.key.method": "mse"})
    spec = describe(tiny_config(layers=1, heads=3, kv_heads=3))
    shapes = {name: own.shape for name, own in needed_artefacts(recipe, spec).items()}
    assert shapes["layers.0.key.scale"] == (2,)
    assert shapes["layers.0.key.group1.scale"] == (1,)
    numbers = {"key.scale": [0.5, 0.125], "key.group1.scale": [0.25], "value.scale": 1.0, "value.group1.scale": 2.0}
    plan = make_plan(recipe, spec, {f"layers.0.{n}": torch.tensor(x, dtype=torch.float64) for n, x in numbers.items()})
    found = {group.heads: (group.codecs["key"].scale, group.codecs["value"].scale) for group in plan.layers[0]}
    assert found == {(0,): (0.5, 1.0), (2,): (0.125, 1.0), (1,): (0.25, 2.0)}


def test_places_of_channels_and_scales_of_heads_exclude_each_other(tiny_config):
    skvq, fp8 = (load_recipe(name).to_dict() for name in ("skvq2", "fp8"))
    key = {**fp8["key"], "granularity": "head"}
    recipe = parse_recipe({"name": "both", "key": key, "value": {**skvq["value"], "group": 16}}, "both")
    spec = describe(tiny_config(layers=1))
    with pytest.raises(RecipeError, match="use granularity tensor"):
        make_plan(recipe, spec, stand_in_artefacts(recipe, spec))


@pytest.mark.parametrize("name", ["kivi2", "kivi4", "flexgen4", "gear2-light", "qjl", "tokennorm2"])
def test_a_head_that_groups_do_not_divide_is_told_how_to_go_on(tiny_config, name):
    """Heads of 80 channels: the sentence names settings, and with them there is a plan."""
    spec, recipe, settings = describe(tiny_config(layers=1, head_dim=80)), load_recipe(name), {}
    while True:
        try:
            plan = make_plan(recipe.override(settings) if settings else recipe, spec)
            break
        except RecipeError as error:
            setting, _, value = re.search(r"--set ([a-z.]+)(=)([0-9]+)", str(error)).groups()
            assert setting not in settings
            settings[setting] = int(value)
    assert settings
    assert set(plan.layers) == {0}


def test_exact_layers_count_16_bits_whatever_the_checkpoint_has():
    """The cache that is compared with has 16 bits too. Control: a quantized layer costs what its layout says."""
    spec = describe(LlamaConfig(num_hidden_layers=2, dtype="float32"))
    assert make_plan(load_recipe("fp16"), spec).bits_per_element == 16
    assert make_plan(load_recipe("int8"), spec).bits_per_element < 9
