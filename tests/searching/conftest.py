"""A tiny model with statistics of everything, and a small search space."""

import pytest
import torch

from kvq.calib.collect import collect
from kvq.calib.needs import ALL_NEEDS
from kvq.models.describe import describe
from kvq.searching.space import expand
from kvq.searching.variants import Variants

SPACE = {
    "key": [
        {
            "name": "principal",
            "transforms": [{"kind": "shift"}, {"kind": "principal"}],
            "codec": {"codec": "tiers", "group": 32, "meta": "range8"},
            "vary": {"bits": [[2, 0], [2, 2], [4, 2], [4, 4]]},
        },
        {"name": "plain", "codec": {"codec": "affine", "axis": "channel", "group": 32}, "vary": {"bits": [2, 4, 8]}},
    ],
    "value": [
        {
            "name": "rotated",
            "transforms": [{"kind": "hadamard"}],
            "codec": {"codec": "affine", "axis": "token", "group": "head"},
            "vary": {"bits": [2, 3, 4, 8]},
        }
    ],
    "tokens": [{"sinks": 4, "window": 32}, {"sinks": 0, "window": 0}],
}


@pytest.fixture(scope="session")
def space_data():
    return SPACE


@pytest.fixture(scope="session")
def searched(tiny_model):
    """(model, spec, stats) of a tiny Llama of three layers, two KV heads of 32 channels."""
    model = tiny_model(layers=3, heads=4, kv_heads=2, head_dim=32)
    windows = torch.randint(3, 100, (4, 96), generator=torch.Generator().manual_seed(1))
    return model, describe(model.config), collect(model, windows, needs=ALL_NEEDS)


@pytest.fixture(scope="session")
def variants(searched):
    _, spec, stats = searched
    return Variants(expand(SPACE, spec, stats), spec, stats)
