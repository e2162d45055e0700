"""The position law: one text has the same packed error at all positions, or the recipe says that it has not."""

import pytest
import torch
from transformers import AutoConfig

from kvq.cache import make_plan
from kvq.calib.artefacts import fit_artefacts, stand_in_artefacts
from kvq.calib.collect import collect
from kvq.calib.learn import learned_steps
from kvq.calib.needs import ALL_NEEDS
from kvq.diagnosis.error import stored
from kvq.errors import RecipeError
from kvq.models.describe import describe
from kvq.models.rope import rope_of
from kvq.recipe import list_recipes, load_recipe, parse_recipe
from kvq.recipes import headline

STARTS = (4096, 32768, 120000)
# Angles are computed in float32, and codes at an edge change with them.
SPREAD = 0.1
NAMES = [name for name in list_recipes() if not load_recipe(name).is_exact]


@pytest.fixture(scope="module")
def model(tiny_model):
    """Keys with large means, as trained models have; contexts of 128K."""
    config = AutoConfig.for_model(
        "qwen2", vocab_size=128, hidden_size=128, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=131072, initializer_range=0.15, pad_token_id=0,
    )  # fmt: skip
    made = tiny_model(config, dtype=torch.float64)
    bias = made.model.layers[0].self_attn.k_proj.bias
    bias.data = 3 * torch.randn(bias.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return made


@pytest.fixture(scope="module")
def stats(model):
    return collect(model, windows(4, 256, seed=1), needs=ALL_NEEDS)


@pytest.fixture(scope="module")
def keys(model):
    """[1, K, 516, D] float64 of another text, before RoPE."""
    found = collect(model, windows(1, 516, seed=2), needs=frozenset(["reservoir"])).layers[0]["reservoir"]
    ((_, key, _),) = found.windows()
    return rope_of(model.config).inverse(key[None], torch.arange(516).unsqueeze(0))


def windows(rows, length, seed):
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    made = tmp_path_factory.mktemp("model")
    model.save_pretrained(made)
    return made


def planned(recipe, model, stats, folder=None):
    spec = describe(model.config)
    # What codebooks are learned from takes gradients; the law holds whatever their levels.
    if "calibrated" in (getattr(recipe.key, "levels", ""), getattr(recipe.value, "levels", "")):
        return make_plan(recipe, spec, stand_in_artefacts(recipe, spec))
    return make_plan(recipe, spec, fit_artefacts(recipe, spec, stats, folder))


def packed_error(group, keys, rope, start):
    """Relative error of stored keys at positions from ``start`` on."""
    positions = torch.arange(start, start + keys.shape[2]).unsqueeze(0)
    exact = rope.rotate(keys, positions)
    found = stored(group, "key", exact, positions)
    return float((found - exact).norm() / exact.norm())


def keys_only(name):
    """The recipe with values of its own kind left alone: they have no positions, and some are fitted to weights."""
    recipe = load_recipe(name)
    plain = {"codec": "affine", "bits": 8, "axis": "token", "group": "head"}
    data = recipe.to_dict() | {"value": plain}
    data["transforms"] = {"key": recipe.transforms.to_dict().get("key", [])}
    data.pop("layers", None)
    return parse_recipe(data, source=name)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_text_has_the_same_error_everywhere_or_the_recipe_says_so(name, model, stats, keys, folder):
    recipe, spec = keys_only(name), describe(model.config)
    if any(learned_steps(recipe, spec)):
        assert recipe.is_bound_to_positions == load_recipe(name).is_bound_to_positions
        assert recipe.is_bound_to_positions, "a learned step of keys that is fitted after RoPE"
        return
    if any(step.reads_output("key") or step.kind == "rope_bias" for step in recipe.transforms.key):
        pytest.skip("fitted to the weights of a checkpoint, which commute with RoPE or are the model's own")
    group, rope = planned(recipe, model, stats, folder).layers[0][0], rope_of(model.config)
    near = packed_error(group, keys, rope, 0)
    far = [packed_error(group, keys, rope, start) for start in STARTS]
    if not recipe.is_bound_to_positions:
        assert all(abs(error - near) < SPREAD * near for error in far), (near, far)


def test_a_basis_that_is_fitted_after_rope_loses_with_distance(model, stats, keys):
    """Negative control: the same recipe where klt stood before."""
    after = {"transforms.key": [{"kind": "shift"}, {"kind": "principal"}]}
    rope, recipe = rope_of(model.config), keys_only("klt2")
    assert not recipe.is_bound_to_positions
    moved = recipe.override(after)
    assert moved.is_bound_to_positions
    group = planned(moved, model, stats).layers[0][0]
    near, far = (packed_error(group, keys, rope, start) for start in (0, 32768))
    assert far > 1.05 * near
    here = planned(recipe, model, stats).layers[0][0]
    assert packed_error(here, keys, rope, 32768) < 1.02 * packed_error(here, keys, rope, 0)


def test_which_recipes_are_bound():
    """The list, which imports no torch, is told the same by the recipes' files, and a file cannot say otherwise."""
    bound = {name for name in list_recipes() if load_recipe(name).is_bound_to_positions}
    assert bound == {name for name in list_recipes() if headline(name)["is_bound_to_positions"]}
    for name, told in (("klt2", "calibrated"), ("balance4", "any")):
        with pytest.raises(RecipeError, match="its steps say otherwise"):
            parse_recipe(load_recipe(name).to_dict() | {"contexts": told}, source=name)
    assert not bound & {"klt4", "klt3", "klt2", "klt2-light", "int4", "kivi2", "kvquant3", "skvq2", "quarot4", "qoq4"}
    assert bound >= {"balance4", "smoothrot4", "oscar2", "affinequant4", "align4"}
