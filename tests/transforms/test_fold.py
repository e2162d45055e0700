"""Folding changes nothing: L1 of the exactness levels, on tiny float64 models of every architecture, with controls that
must fail.

Three laws for every family, with random steps of each form:

    online    attention through transforms, prompt and chunks and single tokens, gives the model's own logits
    folded    so does the model with what folds in its weights, without kvq
    both      and that model with the remaining steps online
"""

import copy
import dataclasses

import pytest
import torch

from kvq.cache import make_plan
from kvq.cache import plan as cache_plan
from kvq.errors import RecipeError
from kvq.integrations.runtime import install, new_cache, uninstall
from kvq.models.architecture import describe_attention
from kvq.models.describe import describe
from kvq.models.rope import rope_of
from kvq.recipe import parse_recipe
from kvq.transforms import needed_tensors
from kvq.transforms.fold import Scale, fold
from kvq.transforms.fold_plan import plan_folds

pytestmark = pytest.mark.usefixtures("keep_double")
BOUND = 1e-10
TOKENS = 30
# Steps of a chain that fold, (key, value) of (align, smooth, hadamard) and (smooth, balance), by the layers that are
# full, and a word of the reason where not all do.
PAIRED, NORMED = (2, 2, "rotary"), (0, 2, "norm")
EXPECTED = {
    "llama": PAIRED,
    "llama_bias": PAIRED,
    "llama_odd_head": PAIRED,
    "mixtral": PAIRED,
    "qwen2": PAIRED,
    "qwen3": NORMED,
    "gemma2": PAIRED,
    "gemma3_text": NORMED,
    "gemma4_text": (0, 0, "norm"),
    "gpt_oss": PAIRED,
    "phi": PAIRED,
    "phi3": PAIRED,
    "gpt_neox": PAIRED,
    "cohere": NORMED,
    "cohere2": (3, 2, None),
    "glm4": PAIRED,
    "olmo": PAIRED,
    "olmo2": NORMED,
    "qwen3_next": (0, 0, "norm"),
    "opt": (3, 2, None),
}
KEY = [{"kind": "align"}, {"kind": "smooth"}, {"kind": "hadamard"}]
VALUE = [{"kind": "smooth"}, {"kind": "balance"}]


def recipe(key=KEY, value=VALUE):
    """Everything stays in the exact window, which is in the basis of the transforms too."""
    codec = {"codec": "affine", "bits": 8, "axis": "token", "group": "head"}
    tokens = {"sinks": 1, "window": 512}
    transforms = {"key": key, "value": value}
    return parse_recipe(
        {"name": "x", "key": codec, "value": codec, "tokens": tokens, "transforms": transforms}, source="x"
    )


def random_artefacts(model, mine, paired=True):
    """Random tensors for every step: scales and angles by rotary pair, and matrices."""
    spec, generator, found = describe(model.config), torch.Generator().manual_seed(5), {}
    attention = describe_attention(spec.config)
    for layer in spec.full_layers:
        partner, second = partners(model, layer.head_dim, attention[layer.index])
        norm = attention[layer.index].key_norm
        shared = norm is not None and norm.shared
        for side in ("key", "value"):
            specs = getattr(mine.transforms, side)
            for name, own in needed_tensors(specs, layer.kv_heads, layer.head_dim).items():
                x = torch.rand(own.shape, dtype=torch.float64, generator=generator) + 0.5
                if name.endswith("partner"):
                    x = partner
                elif name.endswith("matrix"):
                    x = x + 3 * torch.eye(layer.head_dim, dtype=torch.float64)
                elif side == "key" and paired:
                    x = torch.maximum(x, x[..., partner])
                    x = x[:1].expand_as(x).clone() if shared else x
                if name.endswith("imaginary"):
                    x = torch.where(second, -x, x) * (partner != torch.arange(len(partner)))
                found[f"layers.{layer.index}.{side}.{name}"] = x
    return found


def partners(model, head_dim, attention):
    if attention.rotary:
        return rope_of(model.config).partners(head_dim)
    return torch.arange(head_dim), torch.zeros(head_dim, dtype=torch.bool)


def rope_or_reason(model):
    try:
        return rope_of(model.config)
    except Exception:
        return "the rotary embedding is of an unusual form"


def planned(model, plan, attention=None, rope=None):
    spec = plan.model
    attention = attention or describe_attention(spec.config)
    head_dims = {layer.index: layer.head_dim for layer in spec.full_layers}
    return plan_folds(plan.chains, head_dims, attention, rope or rope_or_reason(model), model.state_dict())


def apply_folds(model, folds):
    parameters = dict(model.named_parameters())
    for name, operations in folds.operations.items():
        parameters[name].data = fold(parameters[name].data, operations)


def exact_model(model):
    """The model, or a copy that applies the softcap of its attention: what transformers 5.17 chooses leaves it out."""
    if getattr(model.config, "attn_logit_softcapping", None) and model.config._attn_implementation != "eager":
        model = copy.deepcopy(model)
        model.set_attn_implementation("eager")
    return model


def plain_logits(model):
    with torch.no_grad():
        return exact_model(model)(token_ids(), use_cache=False).logits


def token_ids():
    return torch.randint(3, 128, (2, TOKENS), generator=torch.Generator().manual_seed(6))


def cached_logits(model, plan):
    """A prompt, a chunk, and single tokens, through the packed cache."""
    install(model, plan)
    try:
        cache, ids, out = new_cache(model), token_ids(), []
        with torch.no_grad():
            for part in (ids[:, :13], ids[:, 13:20], *ids[:, 20:].split(1, dim=1)):
                out.append(model(part, past_key_values=cache).logits)
    finally:
        uninstall(model)
    return torch.cat(out, dim=1)


def error(found, exact):
    return float((found - exact).abs().max() / exact.abs().max())


@pytest.fixture(params=[*sorted(EXPECTED), "smollm3"])
def family(request):
    return request.param


def test_transforms_change_no_logit_online_or_folded_or_both(family, family_model):
    model, mine = family_model(family), recipe()
    exact, spec = plain_logits(model), describe(model.config)
    artefacts = random_artefacts(model, mine)
    plan = make_plan(mine, spec, artefacts)
    assert error(cached_logits(model, plan), exact) < BOUND
    folds = planned(model, plan)
    expect_folds(family, folds, spec)
    apply_folds(model, folds)
    assert error(plain_logits(model), exact) < BOUND
    both = make_plan(mine, spec, artefacts, folds.folded)
    assert error(cached_logits(model, both), exact) < BOUND


def expect_folds(family, folds, spec):
    if family == "smollm3":
        # The second layer does not rotate keys, so everything folds there.
        assert folds.folded == {0: {"key": 2, "value": 2}, 1: {"key": 3, "value": 2}}
        return
    key, value, reason = EXPECTED[family]
    for layer in spec.full_layers:
        counts = folds.folded.get(layer.index, {})
        assert (counts.get("key", 0), counts.get("value", 0)) == (key, value)
        left = folds.left.get(layer.index, {})
        assert (reason is None and not left) or reason in left["key"]


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "gemma4_text", "olmo2", "cohere", "qwen3_next"])
def test_a_scale_by_pair_folds_into_the_weight_of_a_norm(family, family_model):
    model, mine = family_model(family), recipe(key=[{"kind": "smooth"}], value=[])
    exact = plain_logits(model)
    plan = make_plan(mine, describe(model.config), random_artefacts(model, mine))
    folds = planned(model, plan)
    assert not folds.left
    assert folds.operations
    assert all("norm" in name for name in folds.operations)
    apply_folds(model, folds)
    assert error(plain_logits(model), exact) < BOUND


def test_a_rotation_of_values_passes_a_norm_without_weight(family_model):
    model, mine = family_model("gemma4_text"), recipe(key=[], value=[{"kind": "hadamard", "seed": 1}])
    exact = plain_logits(model)
    plan = make_plan(mine, describe(model.config))
    folds = planned(model, plan)
    assert not folds.left
    # Layers 1 and 3 are full; layer 3 reads what layer 1 stores.
    assert {name.split("layers.")[1].split(".")[0] for name in folds.operations} == {"1", "3"}
    apply_folds(model, folds)
    assert error(plain_logits(model), exact) < BOUND
    assert error(cached_logits(model, make_plan(mine, plan.model, None, folds.folded)), exact) < BOUND


@pytest.mark.parametrize("family", sorted(name for name, expected in EXPECTED.items() if expected is PAIRED))
def test_scales_fold_without_a_product(family, family_model):
    """Fused projections too, and heads that do not lie side by side (GPT-NeoX)."""
    model, mine = family_model(family), recipe(key=[{"kind": "smooth"}], value=[{"kind": "smooth"}])
    exact = plain_logits(model)
    folds = planned(model, make_plan(mine, describe(model.config), random_artefacts(model, mine)))
    assert not folds.left
    assert {type(o) for own in folds.operations.values() for o in own} == {Scale}
    apply_folds(model, folds)
    assert error(plain_logits(model), exact) < BOUND


def test_heads_that_lie_side_by_side_are_one_operation(family_model):
    mine = recipe(key=[{"kind": "smooth"}], value=[{"kind": "smooth"}])
    counts = {}
    for family in ("llama", "phi3", "gpt_neox"):
        model = family_model(family)
        folds = planned(model, make_plan(mine, describe(model.config), random_artefacts(model, mine)))
        counts[family] = {len(own) for own in folds.operations.values()}
    # Of one projection; queries, keys and values one after the other; a head's query, key and value together.
    heads = family_model("gpt_neox").config.num_attention_heads
    assert counts == {"llama": {1}, "phi3": {1, 3}, "gpt_neox": {1, 3 * heads}}


def reasons(family_model, family, key=(), value=(), paired=True):
    model, mine = family_model(family), recipe(key=list(key), value=list(value))
    plan = make_plan(mine, describe(model.config), random_artefacts(model, mine, paired=paired))
    folds = planned(model, plan)
    assert not folds.operations
    return " ".join(reason for sides in folds.left.values() for reason in sides.values())


def test_what_does_not_fold_says_why(family_model):
    smooth, shift, rotation = {"kind": "smooth"}, {"kind": "shift"}, {"kind": "hadamard"}
    assert "differs within a rotary pair" in reasons(family_model, "llama", [smooth], paired=False)
    assert "mixes rotary pairs" in reasons(family_model, "llama", [rotation])
    assert "after the rotary embedding" in reasons(family_model, "llama", [shift])
    assert "no place to add it again" in reasons(family_model, "llama", value=[shift])
    assert "takes only scales" in reasons(family_model, "qwen3", [{"kind": "align"}])
    assert "gate" in reasons(family_model, "qwen3_next", value=[rotation])
    assert "undoes all but rotations" in reasons(family_model, "gemma4_text", value=[smooth])


def test_clipped_projections_are_left_alone(family_model):
    model, mine = family_model("olmo", clip_qkv=1.0), recipe(key=[{"kind": "smooth"}], value=[{"kind": "hadamard"}])
    exact = plain_logits(model)
    plan = make_plan(mine, describe(model.config), random_artefacts(model, mine))
    folds = planned(model, plan)
    assert "clip_qkv" in folds.left[0]["key"]
    assert "clip_qkv" in folds.left[0]["value"]
    assert error(cached_logits(model, plan), exact) < BOUND


# Controls: what a planner that did not know would do must show.


def forced_error(model, mine, artefacts, change, rope=None):
    """Error of a fold planned on a changed description of the architecture."""
    exact = plain_logits(model)
    plan = make_plan(mine, describe(model.config), artefacts)
    attention = {i: change(a) for i, a in describe_attention(plan.model.config).items()}
    folds = planned(model, plan, attention, rope)
    assert folds.operations
    apply_folds(model, folds)
    return error(plain_logits(model), exact)


def test_control_a_scale_that_differs_within_a_pair_changes_the_logits(family_model):
    model, mine = family_model("llama"), recipe(key=[{"kind": "smooth"}], value=[])
    artefacts = random_artefacts(model, mine, paired=False)
    assert forced_error(model, mine, artefacts, lambda a: dataclasses.replace(a, rotary=False)) > 1e-2


def test_control_a_bias_that_stays_changes_the_logits(family_model):
    model, mine = family_model("llama_bias"), recipe(key=[], value=[{"kind": "hadamard"}])

    def without_bias(a):
        return dataclasses.replace(a, value=dataclasses.replace(a.value, bias=None))

    assert forced_error(model, mine, {}, without_bias) > 1e-2


def test_control_a_rotation_through_a_gate_changes_the_logits(family_model):
    model, mine = family_model("qwen3_next"), recipe(key=[], value=[{"kind": "hadamard"}])
    assert forced_error(model, mine, {}, lambda a: dataclasses.replace(a, gate=False)) > 1e-2


def test_control_a_scale_of_the_projection_under_a_norm_changes_the_logits(family_model):
    model, mine = family_model("qwen3"), recipe(key=[{"kind": "smooth"}], value=[])
    artefacts = random_artefacts(model, mine)
    no_norm = {"key_norm": None, "query_norm": {}}
    assert forced_error(model, mine, artefacts, lambda a: dataclasses.replace(a, **no_norm)) > 1e-2


@pytest.mark.parametrize(("family", "side"), [("gemma2", "key"), ("gpt_oss", "key"), ("gpt_oss", "value")])
def test_control_a_shift_that_attention_does_not_undo_is_refused_and_changes_the_logits(
    family, side, family_model, monkeypatch
):
    model, mine = family_model(family), recipe(**{"key": [], "value": [], side: [{"kind": "shift"}]})
    artefacts, spec = random_artefacts(model, mine), describe(model.config)
    with pytest.raises(RecipeError, match=rf"'shift' of {side}s is not exact for '{family}', whose layer 0 has"):
        make_plan(mine, spec, artefacts)
    monkeypatch.setattr(cache_plan, "_refuse_inexact", lambda *_: None)
    assert error(cached_logits(model, make_plan(mine, spec, artefacts)), plain_logits(model)) > 1e-4


def test_a_shift_is_exact_elsewhere(family_model):
    shift = [{"kind": "shift"}, {"kind": "hadamard"}]
    for family in ("llama", "gemma3_text"):
        model, mine = family_model(family), recipe(key=shift, value=shift)
        plan = make_plan(mine, describe(model.config), random_artefacts(model, mine))
        assert error(cached_logits(model, plan), plain_logits(model)) < BOUND


def test_control_centring_embeddings_changes_the_logits_of_an_rms_norm_model(family_model):
    """What several tools do before they rotate the residual stream; kvq does not touch embeddings."""
    model = family_model("llama")
    exact = plain_logits(model)
    table = model.get_input_embeddings().weight
    table.data -= table.data.mean(1, keepdim=True)
    assert error(plain_logits(model), exact) > 1e-3
