"""Static ranges and places of channels from statistics."""

import itertools

import pytest
import torch

from kvq.calib.measured import MeasuredLayer
from kvq.calib.observers import Histogram, Range
from kvq.calib.stats import LayerStats
from kvq.codecs import codec_spec
from kvq.codecs.book import channel_ranges
from kvq.codecs.permute import channel_order
from kvq.errors import DataError


@pytest.fixture(scope="module")
def keys():
    generator = torch.Generator().manual_seed(0)
    size = torch.rand(3, 1, 32, generator=generator) * 3 + 0.2
    return torch.randn(1, 3, 4000, 32, generator=generator) * size + torch.randn(3, 1, 32, generator=generator)


@pytest.fixture(scope="module")
def layer(keys):
    return LayerStats({"key_pre.range": Range.observe(keys), "key_pre.histogram": Histogram.observe(keys)})


def measured(layer: LayerStats, tensor: str = "key_pre", heads: int = 3) -> MeasuredLayer:
    return MeasuredLayer(layer, 0, tensor, tuple(range(heads)))


def test_without_outliers_a_range_spans_all_numbers(keys, layer):
    half, middle = channel_ranges(measured(layer), 0).unbind(-1)
    assert torch.allclose(middle - half, keys.amin((0, 2)).double(), atol=1e-6)
    assert torch.allclose(middle + half, keys.amax((0, 2)).double(), atol=1e-6)


def test_with_outliers_it_spans_all_but_their_share(keys, layer):
    half, middle = channel_ranges(measured(layer), 0.02).unbind(-1)
    outside = ((keys[0].double() - middle.unsqueeze(1)).abs() > half.unsqueeze(1)).double().mean(1)
    assert outside.mean().item() == pytest.approx(0.02, abs=0.004)
    for end, q in ((middle - half, 0.01), (middle + half, 0.99)):
        exact = torch.quantile(keys[0].double(), q, dim=1)
        # A bin of the histogram is an eighth of its magnitude wide.
        assert ((end - exact).abs() <= exact.abs() / 8 + 0.05).all()


def test_a_channel_that_never_changes_has_a_range_to_divide_by():
    still = LayerStats({"value.range": Range.observe(torch.full((1, 1, 50, 16), 2.5))})
    half, middle = channel_ranges(measured(still, "value", 1), 0).unbind(-1)
    assert (half > 0).all()
    assert (middle == 2.5).all()


def test_heads_get_their_own_rows_and_the_tensor_follows_the_placement(layer):
    spec = codec_spec(
        codec="book", bits=3, levels="uniform", scale="calibrated", placement="pre_rope",
        outliers={"share": 0.02, "along": "token"},
    )  # fmt: skip
    found = spec.fit(MeasuredLayer(layer, 0, spec.tensor("key"), (2, 0)))
    assert torch.equal(found["range"], channel_ranges(measured(layer), 0.02)[[2, 0]])
    with pytest.raises(DataError, match=r"no 'key.range'"):
        codec_spec(codec="book", bits=3, levels="uniform", scale="calibrated").fit(measured(layer, "key", 1))


def spread_within(ends, order, group):
    grouped = ends[order.long()].view(-1, group, 2)
    return float((grouped - grouped.mean(1, keepdim=True)).square().sum())


def test_places_are_a_permutation_that_puts_like_channels_together():
    ends = torch.randn(96, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64).sort(-1).values * 5
    order = channel_order(ends, 16)
    assert torch.equal(order.sort().values, torch.arange(96, dtype=torch.int32))
    by_size = (ends[:, 1] - ends[:, 0]).argsort()
    assert spread_within(ends, order, 16) < 0.8 * spread_within(ends, by_size, 16)
    assert spread_within(ends, order, 16) < 0.5 * spread_within(ends, torch.arange(96), 16)


def test_small_cases_are_cut_as_well_as_can_be():
    """Six channels in groups of two, against every pairing."""
    ends = torch.tensor([[-1, 1], [-9, 2], [-1.1, 1], [-8, 2], [0, 5], [0, 5.5]], dtype=torch.float64)
    best = min(spread_within(ends, torch.tensor(p), 2) for p in itertools.permutations(range(6)))
    assert spread_within(ends, channel_order(ends, 2), 2) == pytest.approx(best)


@pytest.mark.parametrize(
    ("codec", "more", "top"), [("float8", {}, 448), ("float4", {"group": 16, "meta": "e4m3"}, 2688)]
)
def test_scales_map_the_largest_number_to_the_largest_of_the_format(layer, codec, more, top):
    spec = codec_spec(codec=codec, scale="calibrated", placement="pre_rope", **more)
    found = spec.fit(measured(layer, spec.tensor("key")))["scale"]
    assert float(found) == pytest.approx(float(layer["key_pre.range"].absmax.max()) / top)
