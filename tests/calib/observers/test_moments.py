"""Second moments are sums of outer products, in any split, with weights and without."""

import pytest
import torch

from kvq.calib.observers import moments as module
from kvq.calib.observers.moments import Moments


def draw(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return (x * torch.arange(1, shape[-1] + 1) + 3).to(dtype)


def reference(x: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Token by token in float64; x [B, K, T, D]."""
    x = x.double()
    weights = torch.ones(x.shape[:3]) if weights is None else weights
    return torch.einsum("bkt,bktc,bktd->kcd", weights.double(), x, x)


def assert_close(got: torch.Tensor, expected: torch.Tensor, tolerance: float):
    scale = expected.diagonal(dim1=-2, dim2=-1).sqrt()
    assert ((got - expected).abs() <= tolerance * scale[:, :, None] * scale[:, None]).all()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)]
)
@pytest.mark.parametrize("weighted", [False, True])
def test_moments_are_their_definition(dtype, tolerance, weighted, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_TOKENS", 30)
    x = draw(3, 2, 67, 16, dtype=dtype)
    weights = torch.rand(3, 2, 67, generator=torch.Generator().manual_seed(1)).to(x.dtype) if weighted else None
    got = Moments.observe(x, weights)
    assert got.products.dtype == got.weight.dtype == torch.float64
    assert_close(got.products, reference(x, weights), tolerance)
    expected = weights.double().sum((0, 2)) if weighted else torch.full((2,), 3.0 * 67).double()
    torch.testing.assert_close(got.weight, expected)
    torch.testing.assert_close(got.second, got.products / expected[:, None, None])


@pytest.mark.parametrize("cut", [1, 40, 99])
def test_joining_equals_seeing_all_tokens(cut):
    x = draw(1, 2, 100, 16, dtype=torch.float64)
    merged = Moments.observe(x[:, :, :cut]).merge(Moments.observe(x[:, :, cut:]))
    assert_close(merged.products, reference(x), 1e-14)
    assert (merged.weight == 100).all()


def test_tokens_without_weight_do_not_count():
    x, weights = draw(1, 2, 9, 16), torch.ones(1, 2, 9)
    weights[..., 4:] = 0
    torch.testing.assert_close(Moments.observe(x, weights).products, Moments.observe(x[:, :, :4]).products)


def test_nothing_seen_is_neutral():
    nothing, some = Moments.observe(draw(1, 2, 0, 16)), Moments.observe(draw(1, 2, 5, 16))
    assert nothing.second.isnan().all()
    assert torch.equal(nothing.merge(some).products, some.products)
    assert torch.equal(nothing.merge(some).weight, some.weight)


def test_bad_numbers_are_noticed():
    x = draw(1, 2, 5, 16)
    assert bool(Moments.observe(x).products.isfinite().all())
    x[0, 1, 2, 3] = float("inf")
    assert not bool(Moments.observe(x).products.isfinite().all())


def test_what_is_stored_is_restored():
    moments = Moments.observe(draw(1, 2, 5, 16))
    again = Moments.restore(moments.tensors(), moments.facts())
    assert torch.equal(again.products, moments.products)
    assert torch.equal(again.weight, moments.weight)


def test_query_heads_of_a_group_count_as_tokens_of_their_kv_head():
    query = draw(2, 6, 5, 16)
    got = Moments.observe(query).grouped(2)
    for head, group in enumerate((query[:, :3], query[:, 3:])):
        alone = Moments.observe(group.transpose(0, 1).reshape(1, 1, -1, 16))
        torch.testing.assert_close(got.products[head], alone.products[0], rtol=1e-5, atol=1e-3)
