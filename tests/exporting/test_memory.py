"""Memory plan: predicted bytes follow from the formula of pages, exact tokens and layer kinds."""

import dataclasses
import json

import pytest
import torch
from transformers import Gemma3TextConfig

from kvq.calib.artefacts import needed_artefacts
from kvq.errors import RecipeError
from kvq.exporting.memory import LENGTHS, memory_plan
from kvq.models.describe import describe
from kvq.recipe import load_recipe


@pytest.fixture
def spec(tiny_config):
    return describe(tiny_config(layers=3, kv_heads=2, head_dim=32))


def test_plain_bytes_are_keys_and_values_at_two_bytes(spec):
    """16-bit bytes per token = 2 (K, V) * layers * kv_heads * head_dim * 2, at every length."""
    plan = memory_plan(spec, load_recipe("fp16"))
    assert plan.plain_bytes_per_token == 2 * 3 * 2 * 32 * 2 == plan.bytes_per_token
    assert [row.plain_bytes for row in plan.lengths] == [768 * tokens for tokens in LENGTHS]
    assert [row.ratio for row in plan.lengths] == [1.0] * 3
    assert plan.bits_per_element == 16


def test_kivi2_growth_is_codes_and_metadata(spec):
    """2 bits + (16 + 16) / 32 for scale and minimum = 3 bits; short sequences pay for their exact window."""
    plan = memory_plan(spec, load_recipe("kivi2"))
    assert plan.bits_per_element == 3.0
    assert plan.bytes_per_token == 2 * 3 * 2 * 32 * 3 / 8
    ratios = [row.ratio for row in plan.lengths]
    assert ratios == sorted(ratios)
    assert ratios[-1] < 16 / 3
    assert ratios[-1] == pytest.approx(16 / 3, rel=0.01)


def test_the_checkpoint_dtype_changes_nothing(spec):
    other = dataclasses.replace(spec, dtype=torch.float64)
    assert memory_plan(other, load_recipe("kivi2")) == memory_plan(spec, load_recipe("kivi2"))


def test_calibrated_recipe_needs_no_statistics_for_a_plan(spec):
    """Bytes do not depend on scales."""
    recipe = load_recipe("fp8")
    assert len(needed_artefacts(recipe, spec)) == 6
    assert memory_plan(spec, recipe).bits_per_element == 8


def test_layer_kinds_of_a_hybrid_model():
    """Sliding layers are bounded and stay exact, a layer that the recipe keeps exact grows at 16 bits."""
    config = Gemma3TextConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, sliding_window=64, architectures=["Gemma3ForCausalLM"],
        layer_types=["sliding_attention", "full_attention", "full_attention", "full_attention"],
    )  # fmt: skip
    recipe = load_recipe("int4").override({"layers.1.key.codec": "exact", "layers.1.value.codec": "exact"})
    plan = memory_plan(describe(config), recipe)
    rows = {row.kind: (row.layers, row.bytes_per_token) for row in plan.layer_kinds}
    per_layer = 2 * 2 * 32
    assert rows == {
        "packed": (2, 2 * per_layer * 5 / 8),
        "exact": (1, per_layer * 2),
        "sliding": (1, 0),
    }
    assert plan.lengths[0].plain_bytes == 3 * per_layer * 2 * 4096 + per_layer * 2 * 63
    assert json.loads(json.dumps(plan.to_dict()))["layer_kinds"][0]["kind"] == "packed"


def test_a_pattern_that_matches_nothing_is_refused(spec):
    with pytest.raises(RecipeError, match="matches nothing"):
        memory_plan(spec, load_recipe("int4").override({"layers.7.key.bits": 8}))
