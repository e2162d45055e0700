"""What can be seen of each family: queries, keys before RoPE, hidden states; and what cannot, with the reason."""

import pytest
import torch
from transformers.models.llama import modeling_llama

from kvq.cache import make_plan
from kvq.calib.collect import collect
from kvq.calib.forward import look, plan_layers
from kvq.calib.needs import ALL_NEEDS
from kvq.calib.watch import watch
from kvq.errors import UnsupportedModelError
from kvq.models.describe import describe
from kvq.recipe import load_recipe

# Families whose layers show everything.
WHOLE = ("llama", "gemma2", "gemma3_text", "phi3", "glm4", "gpt_oss", "mixtral", "qwen3_next", "olmo2", "gpt_neox")


def windows(count: int = 3, length: int = 13) -> torch.Tensor:
    return torch.randint(4, 100, (count, length), generator=torch.Generator().manual_seed(0))


def plans_of(model, needs=ALL_NEEDS):
    spec = describe(model.config)
    indices = [layer.index for layer in spec.full_layers]
    return plan_layers(spec, look(model, windows()[:, :1], indices), needs, {})


@pytest.mark.parametrize("name", WHOLE)
def test_these_families_show_everything(tiny_model, family, name):
    model = tiny_model(family(name))
    plans = plans_of(model)
    assert all(plan.needs == ALL_NEEDS and plan.rope is not None for plan in plans.values())
    stats = collect(model, windows(), needs=ALL_NEEDS, batch_size=2)
    assert stats.needs == ALL_NEEDS
    assert not stats.missing
    for index in plans:
        layer = stats.layers[index]
        # A rotation keeps lengths, and tokens at different positions are rotated differently.
        before, after = layer["key_pre.moments"].products, layer["key.moments"].products
        traces = [x.diagonal(dim1=1, dim2=2).sum(1) for x in (before, after)]
        torch.testing.assert_close(traces[0] * plans[next(iter(plans))].rope.factor, traces[1], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(before, after)
        assert layer["query.range"].count == 3 * 13 * 4 // layer["key.range"].absmax.shape[0]


@pytest.mark.parametrize("name", ["smollm3", "cohere2", "llama4_text"])
def test_layers_without_rotation_are_told_from_those_with_it(tiny_model, family, name):
    """SmolLM3 rotates every other layer; the full layers of Cohere 2 and Llama 4 are not rotated."""
    model = tiny_model(family(name))
    plans = plans_of(model)
    rotated = {index for index, plan in plans.items() if plan.rope is not None}
    assert rotated == ({0, 2} if name == "smollm3" else set())
    stats = collect(model, windows(), needs=ALL_NEEDS)
    for index in plans:
        layer = stats.layers[index]
        same = torch.equal(layer["key.range"].sum, layer["key_pre.range"].sum)
        assert same == (index not in rotated)
    assert not stats.missing


def test_keys_of_layers_that_others_read_get_the_queries_of_all(tiny_model, family):
    """Gemma 3n: layer 3 reads the keys of layer 1, so layer 1 has the queries of both."""
    stats = collect(tiny_model(family("gemma3n_text")), windows(), needs=frozenset(["query.range", "key.range"]))
    assert [i for i, layer in stats.layers.items() if "query.range" in layer] == [1]
    assert stats.layers[1]["query.range"].count == 2 * 2 * 3 * 13
    assert stats.layers[1]["key.range"].count == 3 * 13


@pytest.mark.parametrize("name", ["gptj", "bloom", "falcon"])
def test_attention_of_its_own_kind_hides_queries_and_says_so(tiny_model, family, name):
    stats = collect(tiny_model(family(name)), windows(), needs=ALL_NEEDS)
    hidden = {"query.range", "query.histogram", "query.moments", "value.weighted_moments", "reservoir", "sinks"}
    assert hidden <= stats.missing.keys()
    assert "attention interface" in stats.missing["query.range"]
    assert {"key.range", "value.moments", "massive"} <= stats.needs
    assert not hidden & stats.needs
    with pytest.raises(UnsupportedModelError, match=r"'query\.range' of layer 0 cannot be measured: the attention"):
        collect(tiny_model(family(name)), windows(), needs=frozenset(["query.range"]), strict=True)


def test_learned_positions_have_no_key_before_rope(tiny_model, family):
    stats = collect(tiny_model(family("gpt2")), windows(), needs=ALL_NEEDS)
    turned = ("key_pre.", "key_page.", "query_pre.")
    assert stats.missing.keys() == {need for need in ALL_NEEDS if need.startswith(turned)}
    assert "no rotary embedding" in stats.missing["key_pre.range"]


def test_keys_that_are_changed_after_rope_are_not_taken_back(tiny_model, monkeypatch):
    """Control of the rotation's test: what is added to keys after RoPE shows at both positions and fits no rotation."""
    own = modeling_llama.apply_rotary_pos_emb

    def changed(q, k, cos, sin, **kwargs):
        q, k = own(q, k, cos, sin, **kwargs)
        return q, k + 1

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", changed)
    spec_needs = frozenset(["key_pre.range"])
    model = tiny_model()
    looks = look(model, windows()[:, :1], [0, 1])
    monkeypatch.undo()
    plans = plan_layers(describe(model.config), looks, spec_needs, {})
    assert "changed after RoPE" in plans[0].missing["key_pre.range"]


def test_watching_is_undone_after_an_error(tiny_model):
    from transformers import AttentionInterface

    before, model = AttentionInterface.get_interface, tiny_model()

    class Watcher:
        layers = {0: None}  # noqa: RUF012

        def saw_hidden(self, *args):
            pass

        def saw_cache(self, *args):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), watch(model, Watcher()) as cache:
        model(windows(), past_key_values=cache)
    assert AttentionInterface.get_interface is before
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_only_the_watched_model_is_watched(tiny_model):
    model, other, seen = tiny_model(), tiny_model(seed=1), []

    class Watcher:
        layers = {0: None, 1: None}  # noqa: RUF012

        def saw_cache(self, index, key, value):
            seen.append("cache")

        def saw_attention(self, *args):
            seen.append("attention")

        def saw_hidden(self, *args):
            seen.append("hidden")

    with watch(model, Watcher()) as cache:
        other(windows())
        assert not seen
        model(windows(), past_key_values=cache)
    assert seen == ["hidden", "cache", "attention"] * 2


@pytest.mark.parametrize("name", ["smollm3", "cohere2", "llama4_text", "llama", "gemma3_text"])
def test_the_cache_takes_the_same_layers_for_rotated_as_calibration_does(tiny_model, family, name):
    """The plan reads the model's code, calibration looks at keys: codebooks are of what the codec sees."""
    model = tiny_model(family(name))
    recipe = load_recipe("int4").override({"key.placement": "pre_rope", "key.group": 16, "value.group": 16})
    groups = make_plan(recipe, describe(model.config)).layers
    plans = plans_of(model)
    assert {i for i, (group,) in groups.items() if group.frame is not None} == {
        i for i, plan in plans.items() if plan.rope is not None
    }
