"""One side of one layer, or one head of it, is quantized with an option; everything else stays exact."""

import pytest
import torch

from kvq.calib.collect import collect
from kvq.calib.needs import ALL_NEEDS
from kvq.models.describe import describe
from kvq.searching.space import expand, load_space
from kvq.searching.variants import Variants

TOKENS = 1024


@pytest.fixture(scope="module")
def default_space(tiny_model):
    """Every option of the default space on a tiny model with three KV heads."""
    model = tiny_model(layers=2, heads=6, kv_heads=3, head_dim=32)
    spec = describe(model.config)
    windows = torch.randint(3, 100, (2, 96), generator=torch.Generator().manual_seed(1))
    stats = collect(model, windows, needs=ALL_NEEDS)
    return Variants(expand(load_space(), spec, stats), spec, stats)


@pytest.mark.parametrize("side", ["key", "value"])
def test_every_option_of_the_default_space_quantizes_one_head_alone(default_space, side):
    assert len(default_space.space.of(side)) > 10
    for option in default_space.space.of(side):
        plan = default_space.plan(option, default_space.space.tokens[0], 1, 2)
        assert list(plan.layers) == [1]
        quantized = {
            (head, own)
            for group in plan.layers[1]
            for head in group.heads
            for own, rule in group.rules.items()
            if rule.packed(TOKENS) > 0
        }
        assert quantized == {(2, side)}, option.name
        (group,) = (group for group in plan.layers[1] if 2 in group.heads)
        own = default_space.plan(option, default_space.space.tokens[0], 1).layers[1][0]
        assert group.layout.side(side).bits_per_element(1) == own.layout.side(side).bits_per_element(1)
