"""Packed caches under fitted transforms: scoring equals decoding, padding changes nothing, and bias-dominated keys."""

import pytest
import torch
from transformers import AutoConfig

from kvq.cache import make_plan, packed_layers
from kvq.calib.artefacts import fit_artefacts
from kvq.calib.collect import collect
from kvq.calib.needs import needs_of
from kvq.eval.two_view import two_view
from kvq.integrations import runtime
from kvq.models.describe import describe
from kvq.models.rope import rope_of
from kvq.recipe import parse_recipe

TOKEN3 = {"codec": "affine", "bits": 3, "axis": "token", "group": "head"}
CHANNEL2 = {"codec": "affine", "bits": 2, "axis": "channel", "group": 32}
HADAMARD = {"kind": "hadamard"}
LENGTH = 101


def recipe(keys, values, key=TOKEN3, value=TOKEN3, **tokens):
    transforms = {"key": keys, "value": values}
    data = {"name": "mine", "key": key, "value": value, "tokens": tokens, "transforms": transforms}
    return parse_recipe(data, source="mine")


RECIPES = {
    "smooth and rotated": recipe([{"kind": "align"}, {"kind": "smooth"}, HADAMARD], [HADAMARD], sinks=2, window=16),
    "shifted and balanced": recipe([{"kind": "shift"}, {"kind": "balance"}], [{"kind": "balance"}]),
    "balanced by channel": recipe([{"kind": "balance"}], [HADAMARD, {"kind": "shift"}], key=CHANNEL2, window=32),
    "relative to the page": recipe(
        [{"kind": "smooth"}, {"kind": "shift", "at": "page"}, {"kind": "principal"}],
        [],
        key=CHANNEL2,
        sinks=3,
        window=32,
    ),
    "relative to the page, by token": recipe([{"kind": "shift", "at": "page"}, HADAMARD], [HADAMARD], sinks=1),
    "before RoPE": recipe([{"kind": "shift", "at": "pre_rope"}, {"kind": "balance"}], [HADAMARD], sinks=1, window=7),
    "one basis of all heads": recipe(
        [{"kind": "shift", "at": "page"}, {"kind": "principal", "over": "layer"}],
        [{"kind": "shift"}, {"kind": "principal", "over": "layer"}, HADAMARD],
        key=CHANNEL2,
        sinks=1,
        window=32,
    ),
    "few channels": recipe(
        [{"kind": "shift", "at": "pre_rope"}, {"kind": "principal", "over": "layer", "rank": 0.5}],
        [{"kind": "principal", "rank": 16}],
        sinks=1,
        window=7,
    ),
    "few channels after RoPE": recipe([{"kind": "shift"}, {"kind": "principal", "rank": 16}], [], sinks=1, window=7),
    "without bias": recipe([{"kind": "smooth"}, {"kind": "rope_bias"}, HADAMARD], [HADAMARD], sinks=1),
    "without bias by channel": recipe([{"kind": "rope_bias"}], [], key=CHANNEL2),
}


def ids(rows=1, length=LENGTH, seed=1):
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model(tiny_model):
    """A Qwen2-type model whose key biases are twenty times its keys."""
    config = AutoConfig.for_model(
        "qwen2", vocab_size=128, hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, initializer_range=0.15, pad_token_id=0,
    )  # fmt: skip
    model = tiny_model(config, dtype=torch.float64)
    generator = torch.Generator().manual_seed(7)
    for layer in model.model.layers:
        bias = torch.randn(layer.self_attn.k_proj.bias.shape, generator=generator, dtype=torch.float64)
        layer.self_attn.k_proj.bias.data = 20 * bias
        # Queries that answer to what keys say, and little to their bias, as trained models do.
        layer.self_attn.q_proj.weight.data *= 0.05
    return model


@pytest.fixture(scope="module")
def planned(model, tmp_path_factory):
    """Factory ``planned(recipe) -> plan``."""
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)

    def make(mine):
        spec = describe(model.config)
        stats = collect(model, ids(4, 64, seed=3), needs=needs_of(mine, spec) | {"key.range"})
        return make_plan(mine, spec, fit_artefacts(mine, spec, stats, folder))

    return make


@torch.inference_mode()
def through_cache(model, plan, tokens, cuts, mask=None):
    runtime.install(model, plan)
    try:
        cache, found = runtime.new_cache(model), []
        for start, stop in zip([0, *cuts], [*cuts, tokens.shape[1]]):
            extra = {}
            if mask is not None:
                positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, start:stop]
                extra = {"attention_mask": mask[:, :stop], "position_ids": positions}
            found.append(model(tokens[:, start:stop], past_key_values=cache, **extra).logits)
    finally:
        runtime.uninstall(model)
    return torch.cat(found, dim=1), cache


@torch.inference_mode()
def plain(model, tokens):
    return model(tokens, use_cache=False).logits


def gap(a, b):
    return float((a - b).abs().max())


@pytest.mark.parametrize("which", RECIPES)
def test_scoring_in_one_forward_equals_decoding(which, model, planned):
    plan, tokens = planned(RECIPES[which]), ids()
    expected, _ = through_cache(model, plan, tokens, range(1, LENGTH))
    with torch.inference_mode(), two_view(model, plan, "stream"):
        found = model(tokens).logits
    assert gap(found, expected) < 1e-8
    assert gap(plain(model, tokens), expected) > 1e-4


@pytest.mark.parametrize("which", RECIPES)
def test_a_row_in_a_padded_batch_is_the_row_alone(which, model, planned):
    plan, tokens = planned(RECIPES[which]), ids(2, 60)
    mask = torch.ones(2, 60, dtype=torch.bool)
    mask[0, :13] = False
    both, cache = through_cache(model, plan, tokens, (40, 50), mask)
    alone, single = through_cache(model, plan, tokens[:1, 13:], (27, 37))
    assert gap(both[:1, 13:], alone) < 1e-8
    for layer, other in zip(packed_layers(cache), packed_layers(single)):
        for store, lone in zip(layer.stores, other.stores):
            assert (store.seen[0], store.packed["key"][0]) == (lone.seen[0], lone.packed["key"][0])


@pytest.mark.parametrize("which", RECIPES)
def test_attention_that_does_not_read_pages_gets_the_models_own_basis(which, model, planned):
    plan, tokens = planned(RECIPES[which]), ids()
    expected, _ = through_cache(model, plan, tokens, (50, 80, 90))
    model.set_attn_implementation("eager")
    try:
        found, _ = through_cache(model, plan, tokens, (50, 80, 90))
    finally:
        model.set_attn_implementation("sdpa")
    # Eager attention computes its softmax in float32.
    assert gap(found, expected) < 1e-5


def error(model, plan, tokens):
    with torch.inference_mode(), two_view(model, plan, "stream"):
        found = model(tokens).logits
    exact = plain(model, tokens)
    return float((found - exact).square().mean() / exact.square().mean())


def test_removing_the_rotated_bias_saves_keys_that_it_dominates(model, planned):
    """What rotation alone cannot: the energy of a bias stays in the keys whatever is rotated."""
    tokens = ids(2, 120)
    errors = {
        name: error(model, planned(recipe(keys, [], value=TOKEN3 | {"bits": 8})), tokens)
        for name, keys in {
            "plain": [],
            "rotated": [HADAMARD],
            "without bias": [{"kind": "rope_bias"}, HADAMARD],
        }.items()
    }
    assert errors["without bias"] < 0.1 * errors["rotated"]
    assert errors["without bias"] < 0.1 * errors["plain"]


def test_what_the_codec_sees_is_the_key_without_its_rotated_bias(model, planned):
    plan = planned(RECIPES["without bias by channel"])
    group = plan.layers[1][0]
    rope, bias = rope_of(model.config), model.model.layers[1].self_attn.k_proj.bias.detach().view(2, 32)
    keys = torch.randn(1, 2, 9, 32, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 3, 70, 71, 72, 5, 6]])
    with_bias = rope.rotate(keys + bias[None, :, None], positions)
    # Artefacts are stored in float32.
    assert gap(group.frame.enter(with_bias, positions), rope.rotate(keys, positions)) < 1e-5
    assert gap(group.frame.leave(group.frame.enter(with_bias, positions), positions), with_bias) < 1e-12
