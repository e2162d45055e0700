"""The two products over packed pages, and the merge, against dequantize-then-multiply in fp64 on the same codes."""

import itertools

import pytest
import torch
from made_pages import pages_of

from kvq.codecs import AffineCodec, Float8Codec
from kvq.kernels.decode_attention.products import merge_partials, partial_attention

CODECS = [
    AffineCodec(bits=bits, axis=axis, group=group, head_dim=head_dim)
    for bits in (2, 3, 4, 8)
    for head_dim in (16, 64, 96)
    for axis, group in (("token", 16), ("token", head_dim), ("channel", 16), ("channel", 128))
] + [Float8Codec(head_dim=80, scale=0.03)]


def pages_case(codec, pages=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 3, pages * codec.page_tokens, codec.head_dim)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 1
    return pages_of(x, codec), generator


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_scores_equal_q_times_dequantized_keys(codec):
    pages, generator = pages_case(codec)
    q = torch.randn(2, 3, 5, codec.head_dim, generator=generator, dtype=torch.float64)
    reference = q @ codec.dequantized(pages, "key", torch.float64).transpose(-1, -2)
    worst = (codec.scores(pages, "key", q) - reference).abs().amax() / reference.abs().amax()
    assert worst < 1e-13


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_weighted_sum_equals_p_times_dequantized_values(codec):
    pages, generator = pages_case(codec)
    tokens = codec.dequantized(pages, "key", torch.float64).shape[-2]
    p = torch.rand(2, 3, 5, tokens, generator=generator, dtype=torch.float64)
    reference = p @ codec.dequantized(pages, "key", torch.float64)
    worst = (codec.weighted_sum(pages, "key", p) - reference).abs().amax() / reference.abs().amax()
    assert worst < 1e-13


@pytest.mark.parametrize("codec", CODECS[::5], ids=str)
def test_float32_rows_stay_close_to_fp64_on_the_same_codes(codec):
    """Worst row relative to that row: a lost or swapped row cannot hide in a large output."""
    pages, generator = pages_case(codec)
    q = torch.randn(2, 3, 5, codec.head_dim, generator=generator, dtype=torch.float64)
    reference = q @ codec.dequantized(pages, "key", torch.float64).transpose(-1, -2)
    error = (codec.scores(pages, "key", q.float()).double() - reference).norm(dim=-1) / reference.norm(dim=-1)
    assert error.max() < 1e-5


def test_a_wrong_scale_is_seen():
    codec = CODECS[0]
    pages, generator = pages_case(codec)
    q = torch.randn(2, 3, 5, codec.head_dim, generator=generator, dtype=torch.float64)
    good = codec.scores(pages, "key", q)
    pages.pool.all(pages.layout.places["key", "meta"])[..., 0] *= 1.01
    assert ((codec.scores(pages, "key", q) - good).abs().amax() / good.abs().amax()) > 1e-3


@pytest.mark.parametrize("cuts", [(0, 7, 20), (0, 1, 2, 20), (0, 20), (0, 0, 20)])
def test_merging_partials_over_any_cut_gives_the_whole_softmax(cuts):
    """softmax over a union equals the log-sum-exp merge of its parts, an empty part included."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(2, 3, 4, 20, generator=generator, dtype=torch.float64) * 5
    scores[0, 0, 0, :7] = -torch.inf
    values = torch.randn(2, 3, 20, 8, generator=generator, dtype=torch.float64)
    parts = [
        partial_attention(scores[..., a:b], lambda w, a=a, b=b: w @ values[:, :, a:b])
        for a, b in itertools.pairwise(cuts)
    ]
    reference = scores.softmax(-1) @ values
    assert torch.allclose(merge_partials(parts), reference, rtol=0, atol=1e-13)


def test_a_segment_that_a_query_may_not_see_counts_nothing():
    hidden = torch.full((1, 1, 1, 3), -torch.inf, dtype=torch.float64)
    output, lse = partial_attention(hidden, lambda w: w @ torch.ones(1, 1, 3, 2, dtype=torch.float64))
    assert torch.equal(output, torch.zeros_like(output))
    assert lse.item() == -torch.inf
