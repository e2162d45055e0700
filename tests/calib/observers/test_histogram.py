"""Histograms: every number in the bin that holds it, quantiles close to exact ones, counts that join to the bit."""

import pytest
import torch

from kvq.calib.observers.histogram import BINS, LEVELS, MAGNITUDES, Histogram, bin_edges
from kvq.calib.observers.tokens import real_tokens
from kvq.errors import DataError


def draw(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    # Channels of different spread and sign, from tiny to large.
    scale = torch.logspace(-3, 2, shape[-1])
    return (x * scale + scale * torch.linspace(-2, 2, shape[-1])).to(dtype)


def test_every_number_is_counted_in_the_bin_that_holds_it():
    edges = bin_edges()
    assert len(edges) == BINS + 1
    assert (edges.diff() > 0).all()
    numbers = torch.cat([draw(1, 1, 4000, 1).flatten() * s for s in (1e-3, 1.0, 300.0)])
    # Exact edges belong to the bin above for positive numbers, below for negative ones.
    numbers = torch.cat([numbers, edges[LEVELS + 1 : -1].float(), torch.zeros(3)])
    counts = Histogram.observe(numbers.view(1, 1, -1, 1)).counts.flatten()
    expected = torch.histogram(numbers[numbers > 0].double(), edges).hist
    # numpy and torch count an edge in the bin above it, as kvq does on the positive side.
    expected = expected + torch.histogram(-numbers[numbers < 0].double(), edges).hist.flip(0)
    expected[LEVELS] += 3
    assert torch.equal(counts.double(), expected)


def test_what_lies_beyond_ends_in_the_outermost_bins():
    assert (MAGNITUDES.lowest, MAGNITUDES.highest) == (-12, 14)
    x = torch.tensor([2.0**17, -(2.0**17), 2.0**-15, 0.0]).view(1, 1, 4, 1)
    counts = Histogram.observe(x).counts.flatten()
    assert counts.nonzero().flatten().tolist() == [0, LEVELS, BINS - 1]
    assert int(counts[LEVELS]) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("q", [0.0, 0.005, 0.1, 0.5, 0.9, 0.995, 1.0])
def test_quantiles_are_within_a_bin_of_the_exact_ones(q, dtype):
    x = draw(2, 3, 2001, 16, dtype=dtype)
    got = Histogram.observe(x).quantile(q)
    exact = torch.quantile(x.transpose(0, 1).flatten(1, 2).double(), q, dim=1)
    spread = x.double().std(dim=(0, 2))
    assert got.dtype == torch.float32
    # A bin is an eighth of its magnitude wide.
    assert ((got - exact).abs() <= exact.abs() / 8 + 0.02 * spread).all()


def test_quantiles_rise_and_stay_inside_what_was_seen():
    histogram = Histogram.observe(draw(1, 2, 777, 16))
    steps = torch.stack([histogram.quantile(q / 50) for q in range(51)])
    assert (steps.diff(dim=0) >= 0).all()


def test_joining_gives_the_same_bits_in_any_order():
    x = draw(1, 2, 999, 16)
    whole = Histogram.observe(x)
    a, b, c = (Histogram.observe(part) for part in x.split([1, 500, 498], dim=2))
    for merged in (a.merge(b).merge(c), c.merge(a.merge(b)), b.merge(c).merge(a)):
        assert torch.equal(merged.counts, whole.counts)
    assert whole.count == 999


def test_padding_and_batches_change_no_count():
    x, valid = draw(3, 2, 11, 16), torch.ones(3, 11, dtype=torch.bool)
    valid[0, :4], valid[1, 7:], valid[2] = False, False, False
    poisoned = torch.where(valid[:, None, :, None], x, float("nan"))
    alone = Histogram.observe(x[:1, :, 4:]).merge(Histogram.observe(x[1:2, :, :7]))
    assert torch.equal(Histogram.observe(real_tokens(poisoned, valid)).counts, alone.counts)


def test_layout_in_memory_does_not_matter():
    x = draw(2, 33, 3, 16).transpose(1, 2)
    assert not x.is_contiguous()
    assert torch.equal(Histogram.observe(x).counts, Histogram.observe(x.contiguous()).counts)


def test_nothing_seen_has_no_quantile():
    nothing = Histogram.observe(draw(1, 2, 0, 16))
    assert nothing.count == 0
    assert nothing.quantile(0.5).isnan().all()


def test_only_the_bins_in_use_are_stored():
    histogram = Histogram.observe(torch.full((1, 2, 5, 16), 3.0))
    assert histogram.tensors()["counts"].shape == (2, 16, 1)
    for whole in (histogram, Histogram.observe(draw(1, 2, 99, 16)), Histogram.observe(draw(1, 2, 0, 16))):
        again = Histogram.restore(whole.tensors(), whole.facts())
        assert torch.equal(again.counts, whole.counts)


def test_what_is_no_share_is_refused():
    with pytest.raises(DataError, match=r"quantile 1\.5 is no share"):
        Histogram.observe(draw(1, 1, 3, 16)).quantile(1.5)


def test_more_tokens_than_a_count_holds_are_refused():
    full = Histogram(counts=torch.full((1, 1, BINS), 2**31 - 1, dtype=torch.int32))
    with pytest.raises(DataError, match="up to 2,147,483,647 tokens"):
        full.merge(Histogram.observe(torch.ones(1, 1, 1, 1)))


def test_query_heads_of_a_group_count_as_tokens_of_their_kv_head():
    query = draw(2, 6, 5, 16)
    got = Histogram.observe(query).grouped(2)
    for head, group in enumerate((query[:, :3], query[:, 3:])):
        alone = Histogram.observe(group.transpose(0, 1).reshape(1, 1, -1, 16))
        torch.testing.assert_close(got.counts[head], alone.counts[0])
