"""A probe gives what the evaluation gives, without the layers before the changed one."""

import pytest
import torch

from kvq.eval.likelihood import Windows, score_windows
from kvq.searching.measure import Damage, Probe

TOKENS = torch.randint(3, 100, (1, 150), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize(("side", "name"), [("key", "principal bits=4/2"), ("value", "rotated bits=2")])
def test_a_probe_agrees_with_the_evaluation_of_the_whole_model(searched, variants, layer, side, name):
    model, _, _ = searched
    option = variants.space.named(side, name)
    plan = variants.plan(option, variants.space.tokens[0], layer)
    (found,) = score_windows(model, {"it": plan}, Windows(tokens=TOKENS, first=[1]), "stream")
    damage = Probe(model, TOKENS).damages({"it": plan})["it"]
    assert damage.tokens == 149
    assert damage.kl > 1e-5
    assert damage.kl == pytest.approx(float(found["it"].kl.double().mean()), rel=1e-4)
    assert damage.flips == pytest.approx(1 - float(found["it"].agrees.double().mean()), abs=1e-9)


def test_a_probe_without_reuse_agrees_with_one_with_it(searched, variants):
    model, _, _ = searched
    plan = variants.plan(variants.space.named("key", "plain bits=2"), variants.space.tokens[0], 2)
    kept, whole = (Probe(model, TOKENS, reuse=reuse).damages({"it": plan})["it"] for reuse in (True, False))
    assert kept.kl == pytest.approx(whole.kl, rel=1e-4)


def test_reuse_is_proved_and_a_model_that_breaks_it_is_noticed(searched, monkeypatch):
    model, _, _ = searched
    probe = Probe(model, TOKENS)
    assert probe.reuses([0, 1, 2])
    # States of another forward: what a layer with a second way to the past would look like.
    probe.entering[2] = probe.entering[2] + 0.1
    assert not probe.reuses([0, 1, 2])


def test_the_model_is_left_as_it_was(searched, variants):
    model, _, _ = searched
    before = model(TOKENS).logits
    probe = Probe(model, TOKENS)
    plan = variants.plan(variants.space.named("key", "plain bits=2"), variants.space.tokens[0], 1)
    probe.damages({"it": plan})
    probe.local_error(plan)
    assert torch.equal(model(TOKENS).logits, before)
    assert all("forward" not in block.__dict__ for block in probe.blocks)


def test_one_side_and_one_head_alone(searched, variants):
    """Heads of a layer damage less alone than together, and the other side stays exact."""
    model, _, _ = searched
    option = variants.space.named("key", "plain bits=2")
    policy = variants.space.tokens[0]
    plans = {str(head): variants.plan(option, policy, 1, head) for head in (0, 1)}
    plans["both"] = variants.plan(option, policy, 1)
    found = Probe(model, TOKENS).damages(plans)
    assert min(found["0"].kl, found["1"].kl) > 0
    assert max(found["0"].kl, found["1"].kl) < found["both"].kl
    for plan in plans.values():
        assert all(group.rules["value"].packed(10_000) == 0 for group in plan.layers[1])


def test_local_errors_fall_with_bits(searched, variants):
    model, _, _ = searched
    probe = Probe(model, TOKENS)
    policy = variants.space.tokens[0]
    errors = [
        probe.local_error(variants.plan(variants.space.named("value", f"rotated bits={bits}"), policy, 0))
        for bits in (2, 3, 4, 8)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 100


def test_damages_pool_by_tokens():
    pooled = Damage.pooled([Damage(kl=1.0, flips=0.5, tokens=10), Damage(kl=4.0, flips=0.0, tokens=20)])
    assert (pooled.kl, pooled.flips, pooled.tokens) == (3.0, pytest.approx(1 / 6), 30)
