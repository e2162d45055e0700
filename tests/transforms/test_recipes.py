"""Every shipped recipe with transforms on a second architecture: norms of queries and keys that heads share, and
sliding windows (Gemma 3 type). It is calibrated, folds what folds, is exported, loads and decodes, or is refused for
what stands against it. And a softcap (Gemma 2 type) refuses exactly what it makes inexact.
"""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig

import kvq
from kvq.cache.plan import check_transforms
from kvq.calib.collect import collect
from kvq.calib.learn import learn_fits
from kvq.calib.needs import needs_of
from kvq.errors import KvqError, RecipeError
from kvq.eval.two_view import two_view
from kvq.exporting.exporter import export
from kvq.integrations.runtime import new_cache
from kvq.models.describe import describe
from kvq.recipe import list_recipes, load_recipe, parse_recipe

CONTEXT, LENGTH = 300, 304
TRANSFORMED = [name for name in list_recipes() if load_recipe(name).transforms.to_dict()]
# First steps of keys that fold into the weight of their norm: scales, one for all heads.
SCALES = {"smooth", "learned_pairs"}
REFUSED = {"biassafe4": "bias of the key projection, and this model has none that reaches"}


def short(name):
    """A shipped recipe whose learned steps take two optimiser steps a layer."""
    data = load_recipe(name).to_dict()
    for steps in data.get("transforms", {}).values():
        for step in steps:
            if step["kind"].startswith("learned_"):
                step["steps"] = 2
    return parse_recipe(data, source=name)


def ids(rows=1, length=LENGTH, seed=1):
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def gemma3(tiny_model, tmp_path_factory):
    """(model, folder, statistics of everything)."""
    config = AutoConfig.for_model(
        "gemma3_text", vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=3, head_dim=64,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, query_pre_attn_scalar=64,
        sliding_window=16, layer_types=["sliding_attention", "full_attention", "full_attention"], pad_token_id=0,
        initializer_range=0.15, eos_token_id=None, bos_token_id=1,
    )  # fmt: skip
    model = tiny_model(config)
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    folder = tmp_path_factory.mktemp("gemma3")
    model.save_pretrained(folder)
    needs = frozenset().union(*(needs_of(load_recipe(name), describe(model.config)) for name in TRANSFORMED))
    return model, folder, collect(model, ids(4, 64, seed=3), needs=needs)


@torch.inference_mode()
def logits(model, tokens):
    return model(tokens, use_cache=False).logits


@torch.inference_mode()
def decoded(model, tokens):
    """Logits of the tokens after the context: one chunk, then single tokens through the packed cache."""
    cache, found = new_cache(model), []
    for part in (tokens[:, :CONTEXT], *tokens[:, CONTEXT:].split(1, dim=1)):
        found.append(model(part, past_key_values=cache).logits)
    return torch.cat(found[1:], dim=1)


def gap(found, exact):
    return float((found - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("name", TRANSFORMED)
def test_every_recipe_goes_through_a_model_with_norms_and_windows(name, gemma3, tmp_path):
    model, folder, stats = gemma3
    recipe, spec = short(name), describe(model.config)
    if name in REFUSED:
        with pytest.raises(KvqError, match=REFUSED[name]):
            check_transforms(recipe, spec)
        with pytest.raises(KvqError, match=REFUSED[name]):
            export(folder, recipe, tmp_path / "out", stats=stats)
        return
    stats = learn_fits(recipe, spec, stats, folder, state_folder=tmp_path / "state")
    result = export(folder, recipe, tmp_path / "out", stats=replace(stats, weights_fingerprint=""))
    loaded, tokens = kvq.load(tmp_path / "out", dtype=torch.float32), ids()
    assert set(loaded.kvq.plan.layers) == {1, 2}
    for index in (1, 2):
        folded = loaded.kvq.plan.folded.get(index, {})
        # Steps that lose something act on what is packed, and exact tokens stay whole.
        steps = recipe.transforms.value[: len(recipe.transforms.value) - recipe.transforms.codec_steps("value")]
        assert folded.get("value", 0) == len([s for s in steps if s.kind != "shift"])
        first = next(iter(recipe.transforms.key), None)
        assert folded.get("key", 0) == (first is not None and first.kind in SCALES)
    assert result.check is None or result.check["error"] < 1e-5
    exact = logits(model, tokens)
    # The folded weights are the original model.
    assert gap(logits(loaded, tokens), exact) < 1e-4
    # What scoring reads is what decoding reads, and it is quantized.
    with torch.inference_mode(), two_view(loaded, loaded.kvq.plan, "prefill", contexts=CONTEXT):
        scored = loaded(tokens).logits[:, CONTEXT:]
    quantization = (scored - exact[:, CONTEXT:]).square().mean()
    assert 1e-3 < gap(scored, exact[:, CONTEXT:]) < 1
    # Rounding of 1e-7 turns a code over now and then.
    assert (decoded(loaded, tokens) - scored).square().mean() < 0.01 * quantization
    generated = loaded.generate(tokens[:, :20], max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert generated.shape == (1, 25)


def test_a_softcap_refuses_shifts_and_nothing_else():
    config = AutoConfig.for_model(
        "gemma2", vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=64,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=16, attn_logit_softcapping=20.0,
    )  # fmt: skip
    spec = describe(config)
    for name in TRANSFORMED:
        recipe = load_recipe(name)
        # Readers add again, block by block, what a shift relative to the page takes away.
        outside = recipe.transforms.key[: len(recipe.transforms.key) - recipe.transforms.framed_steps]
        shifts = any(step.kind == "shift" for step in outside)
        if shifts:
            with pytest.raises(
                RecipeError, match="'shift' of keys is not exact for 'gemma2', whose layer 1 has a logit"
            ):
                check_transforms(recipe, spec)
        elif name not in REFUSED:
            check_transforms(recipe, spec)
