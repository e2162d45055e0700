"""FP8 scales from statistics, against the same thing computed from the numbers themselves."""

import pytest
import torch

from kvq.calib.measured import MeasuredLayer
from kvq.calib.observers import Histogram, Range
from kvq.calib.stats import LayerStats
from kvq.codecs import CodecSpec, codec_spec
from kvq.codecs.float8 import Float8Codec
from kvq.errors import DataError


def spec(**settings) -> CodecSpec:
    return codec_spec(codec="float8", scale="calibrated", **settings)


def numbers(heads=3, tokens=4000, width=8, tail=1.0) -> torch.Tensor:
    """[1, K, T, D]: each head twice as large as the one before; ``tail`` stretches one number in a thousand."""
    x = torch.randn(1, heads, tokens, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rare = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 1e-3
    x = torch.where(rare, x * tail, x)
    return x * 2.0 ** torch.arange(heads).view(1, -1, 1, 1)


def layer_of(x: torch.Tensor) -> LayerStats:
    parts = {f"{s}.range": Range.observe(x) for s in ("key", "value")}
    return LayerStats(parts | {f"{s}.histogram": Histogram.observe(x) for s in ("key", "value")})


def scale_of(layer: LayerStats, side: str, wanted: CodecSpec, index: int = 0) -> torch.Tensor:
    heads = tuple(range(len(layer[f"{side}.range"].absmax)))
    return wanted.fit(MeasuredLayer(layer, index, side, heads))["scale"]


def error(x: torch.Tensor, scale: float) -> float:
    """Squared error of storing x [..., D] with a scale."""
    codec = Float8Codec(head_dim=x.shape[-1], scale=scale)
    return float((codec.decode(codec.encode(x), torch.float64) - x).square().sum())


def test_max_clips_nothing_that_was_seen():
    x = numbers()
    by_head = x.float().abs().amax((0, 2, 3)).double() / 448
    layer = layer_of(x)
    assert torch.equal(scale_of(layer, "key", spec(granularity="head")), by_head)
    assert torch.equal(scale_of(layer, "key", spec()), by_head.max())
    assert torch.equal(scale_of(layer, "key", spec(method="max", granularity="tensor")), by_head.max())


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9, 100.0])
def test_percentile_is_the_quantile_of_magnitudes(percentile):
    """Within a bin of the histogram, an eighth of its magnitude, and never above the largest number."""
    x = numbers(tail=30.0)
    layer = layer_of(x)
    found = scale_of(layer, "value", spec(method="percentile", percentile=percentile, granularity="head"))
    for head in range(3):
        own = x[:, head].abs().flatten()
        wanted = float(torch.quantile(own, percentile / 100)) / 448
        assert wanted / 1.13 <= float(found[head]) <= wanted * 1.13
        assert float(found[head]) <= float(own.max().float()) / 448
    whole = scale_of(layer, "value", spec(method="percentile", percentile=percentile))
    assert float(whole) == pytest.approx(float(torch.quantile(x.abs(), percentile / 100)) / 448, rel=0.13)


@pytest.mark.parametrize("tail", [1.0, 30.0, 3000.0])
def test_mse_finds_the_best_scale_of_its_grid(tail):
    """On the numbers themselves, no scale of the grid is more than 2 % better than the one found from the histogram."""
    x = numbers(heads=1, tail=tail)
    layer = layer_of(x)
    top = float(scale_of(layer, "key", spec()))
    found = float(scale_of(layer, "key", spec(method="mse")))
    grid = [top * 2 ** (-step / 8) for step in range(33)]
    assert any(found == pytest.approx(scale) for scale in grid)
    assert error(x, found) <= 1.02 * min(error(x, scale) for scale in grid)
    assert error(x, found) <= error(x, top)


def test_mse_by_head_is_the_search_of_each_head():
    x = numbers(tail=3.0)
    found = scale_of(layer_of(x), "key", spec(method="mse", granularity="head"))
    alone = [scale_of(layer_of(x[:, head : head + 1]), "key", spec(method="mse")) for head in range(3)]
    assert torch.equal(found, torch.stack(alone))


@pytest.mark.parametrize("method", [{}, {"method": "percentile", "percentile": 99.0}, {"method": "mse"}])
@pytest.mark.parametrize("granularity", ["tensor", "head"])
def test_what_was_always_zero_has_scale_one(method, granularity):
    x = torch.zeros(1, 2, 16, 8)
    if granularity == "head":
        x[:, 1] = 1.0
    found = scale_of(layer_of(x), "key", spec(granularity=granularity, **method))
    assert float(found.reshape(-1)[0]) == 1.0
    assert bool((found > 0).all())


def test_statistics_that_cannot_be_used():
    x = numbers()
    x[0, 1, 5, 2] = float("inf")
    with pytest.raises(DataError, match="layer 7 hold a key maximum of inf"):
        scale_of(layer_of(x), "key", spec(), index=7)
    with pytest.raises(DataError, match="there is none of keys after transforms: use max"):
        spec(method="mse").fit(MeasuredLayer(layer_of(numbers()), 0, "key", (0, 1), torch.ones(2, 8)))
    lean = LayerStats({"key.range": Range.observe(numbers())})
    with pytest.raises(DataError, match=r"hold no 'key\.histogram': run 'kvq calibrate' again with --for"):
        scale_of(lean, "key", spec(method="mse"))
