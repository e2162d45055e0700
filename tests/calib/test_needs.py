"""Recipes name what they read, and what is collected is what was named."""

import pytest
import torch

from kvq.calib.collect import collect
from kvq.calib.needs import ALL_NEEDS, DEFAULT_NEEDS, JOINT_NEEDS, check_needs, needs_of
from kvq.calib.observers import KINDS
from kvq.errors import DataError
from kvq.models.describe import describe
from kvq.recipe import list_recipes, load_recipe, parse_recipe
from kvq.transforms.hadamard import HadamardSpec


def test_every_need_has_a_kind():
    assert {need.rpartition(".")[2] for need in ALL_NEEDS | JOINT_NEEDS} == set(KINDS)
    assert DEFAULT_NEEDS < ALL_NEEDS


def test_shipped_recipes_name_what_they_read(tiny_config):
    spec = describe(tiny_config(head_dim=32))
    found = {name: needs_of(load_recipe(name), spec) for name in list_recipes()}
    assert found["fp8"] == {"key.range", "value.range"}
    assert found["kivi2"] == found["fp16"] == frozenset()


def test_overrides_of_single_layers_and_heads_count(tiny_config):
    spec = describe(tiny_config(head_dim=32))
    plain = {"name": "mine", "key": {"codec": "float8", "scale": "unit"}, "value": {"codec": "float8", "scale": "unit"}}
    for pattern in ("1", "0/1"):
        recipe = parse_recipe(plain | {"layers": {pattern: {"value": {"scale": "calibrated"}}}}, source="mine")
        assert needs_of(recipe, spec) == {"value.range"}
    assert needs_of(parse_recipe(plain, source="mine"), spec) == frozenset()


def test_a_transform_names_what_it_reads(tiny_config, monkeypatch):
    monkeypatch.setattr(HadamardSpec, "needs", lambda spec, side: [f"{side}.moments", "query.range"])
    codec = {"codec": "affine", "bits": 4, "axis": "token", "group": "head"}
    recipe = {"name": "mine", "key": codec, "value": codec, "transforms": {"key": [{"kind": "hadamard"}]}}
    needs = needs_of(parse_recipe(recipe, source="mine"), describe(tiny_config(head_dim=32)))
    assert needs == {"key.moments", "query.range"}


def test_only_what_was_named_is_collected(tiny_model):
    windows = torch.randint(4, 100, (3, 9), generator=torch.Generator().manual_seed(0))
    for needs in ({"key.range"}, {"query.moments", "sinks"}, {"reservoir"}, {"massive", "key_pre.histogram"}):
        stats = collect(tiny_model(), windows, needs=frozenset(needs))
        assert all(set(layer) == needs for layer in stats.layers.values())


def test_an_unknown_need_is_refused():
    with pytest.raises(DataError, match=r"'key\.rnage' is no statistic\. Did you mean 'key\.range'\?"):
        check_needs(["key.rnage"])
