"""Allocations become ordinary recipes that give every head what was allocated."""

import random

import pytest
import yaml

from kvq.cache import make_plan
from kvq.calib.artefacts import fit_artefacts
from kvq.recipe import parse_recipe
from kvq.searching.allocate import Allocation, Choice
from kvq.searching.assemble import recipe_of
from kvq.searching.sensitivity import Entry


def random_allocation(variants, seed: int) -> Allocation:
    draw = random.Random(seed)
    choices = []
    for index, layer in variants.layers.items():
        for side in ("key", "value"):
            first = draw.choice(variants.space.of(side))
            alike = [o for o in variants.space.of(side) if o.chain == first.chain]
            options = {head: draw.choice(alike) for head in range(layer.kv_heads)}
            for option in dict.fromkeys(options.values()):
                heads = tuple(h for h, own in options.items() if own == option)
                entry = Entry(
                    layer=index,
                    side=side,
                    policy=0,
                    option=option.name,
                    chain="",
                    bits=2.0,
                    error=0.0,
                    damage=0.0,
                    measured=True,
                )
                choices.append(Choice(entry=entry, heads=heads))
    return Allocation(choices=tuple(choices), predicted=0.0, bits=2.0, bound=0.0, gap=0.0, optimal=True)


@pytest.mark.parametrize("seed", range(12))
def test_every_head_gets_what_was_allocated(variants, searched, seed):
    _, spec, stats = searched
    allocation = random_allocation(variants, seed)
    recipe = recipe_of(allocation, variants.space, variants.layers, "mine", "a test")
    for choice in allocation.choices:
        option = variants.space.named(choice.entry.side, choice.entry.option)
        for head in choice.heads:
            own = recipe.for_head(choice.entry.layer, head, len(spec.layers))
            assert getattr(own, choice.entry.side) == option.codec
            chain = getattr(own.transforms, choice.entry.side)
            assert [step.to_dict() for step in chain] == [dict(step) for step in option.chain]
            assert own.tokens == variants.space.tokens[0]
    again = parse_recipe(yaml.safe_load(recipe.to_yaml()), source="again")
    assert again.hash == recipe.hash
    assert make_plan(again, spec, fit_artefacts(again, spec, stats)).bits_per_element > 2
