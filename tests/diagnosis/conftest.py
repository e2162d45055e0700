"""Tiny models made so that known recipes collapse."""

import pytest
import torch

from kvq.calib.collect import collect
from kvq.calib.needs import ALL_NEEDS, DEFAULT_NEEDS


@pytest.fixture(scope="session")
def measured():
    """``measured(model, full=False, **settings) -> Stats`` over random tokens, four windows of 256."""

    def measure(model, full: bool = False, **settings):
        windows = torch.randint(3, 100, (4, 256), generator=torch.Generator().manual_seed(0))
        settings.setdefault("needs", ALL_NEEDS if full else DEFAULT_NEEDS)
        return collect(model, windows, **settings)

    return measure


@pytest.fixture(scope="session")
def biased(tiny_model):
    """``biased(size) -> model``: a constant of ``size`` on the slowest rotary channel of every key."""

    def make(size: float, **settings):
        model = tiny_model(layers=3, head_dim=32, attention_bias=True, **settings)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.k_proj.bias.zero_()
                layer.self_attn.k_proj.bias.view(-1, 32)[:, 15] = size
        return model

    return make
