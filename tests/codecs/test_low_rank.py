"""Low-rank factors against the singular value decomposition, and their limits."""

import itertools

import pytest
import torch

from kvq.codecs import AffineCodec
from kvq.codecs.low_rank import LowRank, LowRankCodec, factors


def codec_of(rank, block=64, form="float16", axis="channel", group=32):
    inner = AffineCodec(bits=2, axis=axis, group=group, head_dim=32)
    return LowRankCodec(inner=inner, part=LowRank(rank=rank, block=block, format=form))


def residual_norm(codec, x):
    return (codec.decode(codec.encode(x), torch.float64) - x).norm()


def decaying(rows, columns, seed=0):
    """A matrix with singular values 1, 1/4, 1/16, ..."""
    generator = torch.Generator().manual_seed(seed)
    u, _, v = torch.linalg.svd(
        torch.randn(rows, columns, generator=generator, dtype=torch.float64), full_matrices=False
    )
    return (u * 0.25 ** torch.arange(min(rows, columns), dtype=torch.float64)) @ v


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_factors_are_the_leading_singular_vectors(rank):
    x = torch.stack([decaying(64, 32, seed) for seed in range(5)])
    a, b = factors(x, rank)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    best = (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]
    error, least = (x - a @ b.mT).norm(dim=(1, 2)), (x - best).norm(dim=(1, 2))
    assert (error <= 1.02 * least).all()
    assert torch.allclose(a.norm(dim=-2), b.norm(dim=-2))


@pytest.mark.parametrize(("rows", "columns"), [(64, 32), (16, 80), (32, 32)])
def test_full_rank_is_exact_and_more_than_full_is_padded_with_zeros(rows, columns):
    x = torch.randn(2, rows, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    full = min(rows, columns)
    a, b = factors(x, full)
    assert torch.allclose(a @ b.mT, x, atol=1e-10)
    more, _ = factors(x, full + 3)
    assert more.shape[-1] == full + 3
    assert not more[..., full:].any()


@pytest.mark.parametrize("rank", [1, 3])
def test_zero_and_low_rank_matrices_need_no_care(rank):
    zero = factors(torch.zeros(1, 64, 32, dtype=torch.float64), rank)
    assert not zero[0].any()
    assert not zero[1].any()
    one = torch.outer(torch.arange(64.0).double(), torch.ones(32).double())
    a, b = factors(one, rank)
    assert torch.allclose(a @ b.mT, one)


def test_error_does_not_grow_with_rank_and_full_rank_is_exact_to_fp16(numbers):
    x = numbers(1, 128)
    plain = AffineCodec(bits=2, axis="channel", group=32, head_dim=32)
    norms = [(plain.decode(plain.encode(x), torch.float64) - x).norm()]
    norms += [residual_norm(codec_of(rank), x) for rank in (1, 2, 4, 8, 16, 32)]
    assert all(after <= before for before, after in itertools.pairwise(norms))
    assert norms[-1] < 2e-3 * norms[0]


def test_eight_bit_factors_cost_little(numbers):
    x = numbers(1, 128)
    none, fine, coarse = (
        residual_norm(codec_of(1), x),
        residual_norm(codec_of(4), x),
        residual_norm(codec_of(4, form="e4m3"), x),
    )
    assert coarse - fine < 0.05 * (none - fine) + 1e-9


def test_every_block_has_factors_of_its_own(numbers):
    """Noise elsewhere does not move a block's factors, and a block is the codec's unit."""
    codec = codec_of(2, block=64, axis="token", group=16)
    assert codec.block_tokens == 64
    x, other = numbers(1, 128), numbers(1, 128, seed=4)
    other[:, :, :64] = x[:, :, :64]
    first, second = codec.encode(x).sections, codec.encode(other).sections
    assert torch.equal(first["low_rank_block"][:, :, 0], second["low_rank_block"][:, :, 0])
    assert not torch.equal(first["low_rank_block"][:, :, 1], second["low_rank_block"][:, :, 1])
