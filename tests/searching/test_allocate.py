"""The allocation against every possible one, its budget, and its structure."""

import itertools
import random

import pytest

from kvq.errors import DataError
from kvq.models.describe import LayerSpec
from kvq.searching.allocate import allocate
from kvq.searching.sensitivity import Entry

LAYERS = {i: LayerSpec(index=i, kind="full", kv_heads=2, head_dim=32) for i in (0, 1, 3)}


def entry(layer, side, option, bits, damage, chain="", policy=0, shares=()):
    return Entry(
        layer=layer,
        side=side,
        policy=policy,
        option=option,
        chain=chain,
        bits=bits,
        error=damage,
        damage=damage,
        measured=True,
        shares=shares,
    )


def random_table(seed: int, policies: int = 1) -> list[Entry]:
    draw = random.Random(seed)
    return [
        entry(i, side, f"{bits}", bits + 0.25, draw.uniform(0.5, 2) * 4.0**-bits, chain=f"{bits % 2}", policy=policy)
        for i in LAYERS
        for side in ("key", "value")
        for bits in (2, 3, 4)
        for policy in range(policies)
    ]


def by_brute_force(table, budget, policies=1) -> float:
    """Least sum of damages, by trying everything."""
    units = [(i, side) for i in LAYERS for side in ("key", "value")]
    best = float("inf")
    for taken in itertools.product(range(policies), repeat=len(LAYERS)):
        own = dict(zip(LAYERS, taken))
        menus = [[e for e in table if (e.layer, e.side) == u and e.policy == own[u[0]]] for u in units]
        for rows in itertools.product(*menus):
            if sum(e.bits for e in rows) / len(rows) <= budget + 1e-9:
                best = min(best, sum(e.damage for e in rows))
    return best


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [2.25, 2.6, 3.3, 4.25])
def test_it_is_the_least_of_all(seed, budget):
    table = random_table(seed)
    found = allocate(table, LAYERS, budget)
    assert found.predicted == pytest.approx(by_brute_force(table, budget), rel=2e-4)
    assert found.bits <= budget + 1e-6
    assert found.optimal
    assert found.bound <= found.predicted
    assert found.gap <= 1e-3


def test_sides_of_a_layer_share_a_token_policy():
    table = random_table(7, policies=2)
    found = allocate(table, LAYERS, 2.8)
    assert found.predicted == pytest.approx(by_brute_force(table, 2.8, policies=2), rel=2e-4)
    for layer in LAYERS:
        assert len({c.entry.policy for c in found.choices if c.entry.layer == layer}) == 1


def test_heads_may_differ_but_share_a_chain():
    rows = []
    for i in LAYERS:
        for side in ("key", "value"):
            # Head 0 has nearly all the damage: it should get the bits.
            for name, bits, damage, chain in (("a2", 2, 1.0, "a"), ("b3", 3, 0.2, "b"), ("a4", 4, 0.1, "a")):
                rows.append(entry(i, side, name, bits, damage, chain, shares=(0.95, 0.05)))
    whole = allocate(rows, LAYERS, 3.0, by_head=False)
    heads = allocate(rows, LAYERS, 3.0, by_head=True)
    assert heads.predicted < whole.predicted
    assert any(choice.heads == (0,) and choice.entry.option == "a4" for choice in heads.choices)
    for i in LAYERS:
        for side in ("key", "value"):
            own = [c for c in heads.choices if (c.entry.layer, c.entry.side) == (i, side)]
            assert len({c.entry.chain for c in own}) == 1
            assert sorted(h for c in own for h in c.heads) == [0, 1]


def test_large_layers_weigh_more():
    layers = {0: LayerSpec(index=0, kind="full", kv_heads=1, head_dim=32), 1: LAYERS[1]}
    table = [entry(i, s, f"{b}", b, 4.0**-b) for i in layers for s in ("key", "value") for b in (2, 8)]
    # Two thirds of the numbers belong to layer 1, so 8 bits in layer 0 alone cost 2 bits a number.
    found = allocate(table, layers, 4.0)
    assert {c.entry.layer for c in found.choices if c.entry.bits == 8} == {0}
    assert found.bits == pytest.approx(4.0)


def test_a_budget_below_the_least_is_refused_with_the_least():
    with pytest.raises(DataError, match=r"budget=1 bits is below 2\.25.*raise it"):
        allocate(random_table(0), LAYERS, 1.0)
