"""Laws: drawn tokens have the distribution that was measured; real ones are used where they are at hand."""

import pytest
import torch

from kvq.calib.observers import Histogram, Moments, Range
from kvq.calib.stats import LayerStats
from kvq.diagnosis.predict import layers_of
from kvq.diagnosis.sample_tokens import draw
from kvq.errors import DataError


def layer(x: torch.Tensor, *kinds) -> LayerStats:
    names = {Range: "range", Histogram: "histogram", Moments: "moments"}
    return LayerStats({f"key.{names[kind]}": kind.observe(x) for kind in kinds})


@pytest.fixture
def skewed():
    """[1, 2, 5000, 3]: channels with different means, tails and spreads."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 2, 5000, 3, generator=generator)
    return torch.stack([x[..., 0].exp(), 5 + 0.1 * x[..., 1], -(x[..., 2] ** 2)], dim=-1)


def test_drawn_by_histogram_they_have_its_quantiles(skewed):
    drawn = draw(layer(skewed, Range, Histogram), "key", 20000, torch.Generator().manual_seed(0))
    assert drawn.shape == (2, 20000, 3)
    for q in (0.05, 0.5, 0.95):
        expected, found = skewed[0].quantile(q, dim=1), drawn.quantile(q, dim=1)
        torch.testing.assert_close(found, expected, rtol=0.13, atol=0.02)


def test_drawn_without_histogram_they_have_mean_and_spread_within_the_range(skewed):
    stats = layer(skewed, Range)
    drawn = draw(stats, "key", 20000, torch.Generator().manual_seed(0))
    channels = stats["key.range"]
    torch.testing.assert_close(drawn[..., 1].mean(1), channels.mean[:, 1], rtol=1e-2, atol=0)
    torch.testing.assert_close(drawn[..., 1].std(1), channels.std[:, 1], rtol=5e-2, atol=0)
    assert bool((drawn.amax(1) <= channels.max).all())
    assert bool((drawn.amin(1) >= channels.min).all())


def test_drawn_by_moments_channels_go_together():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(1, 1, 4000, 2, generator=generator)
    x[..., 1] = 3 * x[..., 0] + 0.1 * x[..., 1] + 2
    with_moments = draw(layer(x, Range, Moments), "key", 8000, torch.Generator().manual_seed(0))
    alone = draw(layer(x, Range), "key", 8000, torch.Generator().manual_seed(0))
    correlation = [float(torch.corrcoef(y[0].T)[0, 1]) for y in (with_moments, alone)]
    assert correlation[0] > 0.99
    assert abs(correlation[1]) < 0.1


def test_the_same_statistics_draw_the_same_tokens(tiny_model, measured):
    stats = measured(tiny_model())
    first, second = layers_of(stats), layers_of(stats)
    assert torch.equal(first[0].key, second[0].key)
    assert not torch.equal(first[0].key, first[1].key)


def test_the_first_drawn_token_is_the_mean_first_one(tiny_model, measured):
    stats = measured(tiny_model())
    sinks = stats.layers[1]["sinks"]
    torch.testing.assert_close(layers_of(stats)[1].key[0, :, 0].double(), sinks.first_key / 4, rtol=1e-5, atol=1e-6)


def test_keys_of_layers_without_rope_are_not_rotated(family, tiny_model, measured):
    """SmolLM3 leaves every second layer unrotated: tokens drawn before RoPE must stay as they are there."""
    stats = measured(tiny_model(family("smollm3")))
    layers = layers_of(stats)
    for index, name in ((0, "key"), (1, "key")):
        drawn, channels = layers[index].key[0, :, 1:], stats.layers[index][f"{name}.range"]
        spread = drawn.std(1) / channels.std
        assert 0.8 < float(spread.median()) < 1.25
    unrotated = [i for i in (0, 1, 2, 3) if torch.equal(
        stats.layers[i]["key.range"].absmax, stats.layers[i]["key_pre.range"].absmax)]  # fmt: skip
    assert unrotated == [1, 3]


def test_statistics_without_queries_are_refused(tiny_model, measured):
    stats = measured(tiny_model(), needs=frozenset({"key.range", "value.range"}))
    with pytest.raises(DataError, match="hold no queries"):
        layers_of(stats)
