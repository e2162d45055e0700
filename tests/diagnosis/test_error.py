"""Law: the predicted error of attention is that of attention over the numbers which the cache gives back."""

import pytest
import torch

from kvq.cache import make_plan
from kvq.diagnosis.error import attention_error, stored
from kvq.diagnosis.predict import layers_of
from kvq.recipe import load_recipe


@pytest.fixture(scope="module")
def stats(tiny_model, measured):
    return measured(tiny_model(layers=2, head_dim=32), full=True)


def plan_of(stats, name: str, **settings):
    return make_plan(load_recipe(name).override(settings), stats.spec())


def naive_error(tokens, group) -> float:
    """From the definition, a query at a time in float64: a token that the rules leave exact is read as it is."""
    read = {side: stored(group, side, getattr(tokens, side), tokens.positions) for side in ("key", "value")}
    lost = total = 0.0
    per_head = tokens.query.shape[1] // tokens.key.shape[1]
    for head in range(tokens.query.shape[1]):
        for t in tokens.probes.tolist():
            q = tokens.query[0, head, t].double() * tokens.scaling
            mixed, exact = {}, {}
            for side in ("key", "value"):
                exact[side] = getattr(tokens, side)[0, head // per_head, : t + 1].double()
                packed = slice(group.sinks, group.sinks + group.rules[side].seen(t))
                mixed[side] = exact[side].clone()
                mixed[side][packed] = read[side][0, head // per_head, : t + 1].double()[packed]
            outs = [(parts["key"] @ q).softmax(0) @ parts["value"] for parts in (exact, mixed)]
            lost += float((outs[1] - outs[0]).square().sum())
            total += float(outs[0].square().sum())
    return lost / total


@pytest.mark.parametrize("name", ["kivi4", "int4", "sinks4"])
def test_on_real_tokens_it_is_the_definition(stats, name):
    tokens = layers_of(stats)[0]
    assert tokens.is_real
    groups = plan_of(stats, name).layers[0]
    assert attention_error(groups, tokens) == pytest.approx(naive_error(tokens, groups[0]), rel=1e-3)


@pytest.mark.parametrize("full", [True, False], ids=["real", "drawn"])
def test_more_bits_err_less(tiny_model, measured, full):
    stats = measured(tiny_model(layers=2, head_dim=32), full=full)
    tokens = layers_of(stats)[1]
    assert tokens.is_real is full
    errors = [
        attention_error(plan_of(stats, "kivi2", **{"key.bits": b, "value.bits": b}).layers[1], tokens)
        for b in (2, 3, 4, 8)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 20 * errors[2] > 400 * errors[3] > 0


def test_an_exact_layer_has_no_error(stats):
    assert attention_error((), layers_of(stats)[0]) == 0.0


def test_one_side_alone_is_less_than_both(stats):
    tokens, groups = layers_of(stats)[0], plan_of(stats, "kivi2").layers[0]
    parts = [attention_error(groups, tokens, (side,)) for side in ("key", "value")]
    assert all(0 < part < attention_error(groups, tokens) for part in parts)
    assert attention_error(groups, tokens, ()) < 1e-9


def test_what_is_stored_keeps_sinks_and_forgets_no_token(stats):
    tokens = layers_of(stats)[0]
    group = plan_of(stats, "kivi2", **{"tokens.sinks": 4}).layers[0][0]
    found = stored(group, "key", tokens.key, tokens.positions)
    assert torch.equal(found[:, :, :4], tokens.key[:, :, :4])
    whole = (tokens.key.shape[2] - 4) // 32 * 32
    changed = (found != tokens.key).any(-1).all(1)
    assert bool(changed[:, 4 : 4 + whole].all())
    assert not bool(changed[:, 4 + whole :].any())


def test_drawn_tokens_predict_the_error_of_real_ones(tiny_model, measured):
    """Within a factor of two (in e^2), for every recipe: what the estimate is for."""
    model = tiny_model(layers=2, head_dim=32)
    real, drawn = measured(model, full=True), measured(model)
    for name in ("int8", "int4", "kivi4"):
        for index in (0, 1):
            found = [attention_error(plan_of(s, name).layers[index], layers_of(s)[index]) for s in (real, drawn)]
            assert 0.5 < found[0] / found[1] < 2, (name, index, found)
