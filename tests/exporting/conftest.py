"""Statistics that were never measured, for exports whose scales can be worked out by hand."""

from pathlib import Path

import pytest
import torch

from kvq.calib.observers import Range
from kvq.calib.stats import LayerStats, Stats
from kvq.models.describe import describe
from kvq.models.resolve import load_config, weights_fingerprint


def absmax_of(layer: int, side: str) -> float:
    """Largest magnitude that the statistics below state, a number of its own for every layer and side."""
    return 3.0 + layer + (0.25 if side == "value" else 0.0)


def _channels(heads: int, width: int, absmax: float) -> Range:
    """Head 0 reaches absmax, every other head half of it."""
    x = torch.full((heads, width), absmax / 2)
    x[0, 0] = absmax
    return Range(count=8, min=-x, max=x / 2, sum=0 * x.double(), sum_squares=x.double().square())


@pytest.fixture
def made_stats():
    """Factory ``made_stats(folder, sliding=True) -> Stats``, of ``absmax_of`` each."""

    def make(folder: Path, sliding: bool = True) -> Stats:
        spec = describe(load_config(folder))
        kinds = ("full", "sliding") if sliding else ("full",)
        layers = {
            la.index: LayerStats(
                {
                    f"{side}.range": _channels(la.kv_heads, la.head_dim, absmax_of(la.index, side))
                    for side in ("key", "value")
                }
            )
            for la in spec.layers
            if la.kind in kinds
        }
        return Stats(
            layers=layers,
            model="made up",
            model_fingerprint=spec.fingerprint,
            weights_fingerprint=weights_fingerprint(folder),
        )

    return make


@pytest.fixture
def absmax():
    return absmax_of
