"""Channels change places: only which of them share a group changes."""

import torch

from kvq.codecs import codec_spec

HEADS, HEAD_DIM = 3, 32
PLAIN = {"codec": "affine", "bits": 2, "axis": "token", "group": 16}


def round_trip(codec, x):
    return codec.decode(codec.encode(x), torch.float64)


def permuted(order):
    return codec_spec(**PLAIN, permute={"by": "range"}).build(HEAD_DIM, {"order": order}, HEADS)


def test_the_identity_changes_nothing(numbers):
    x = numbers(2, 70)
    order = torch.arange(HEADS * HEAD_DIM).view(HEADS, HEAD_DIM)
    assert torch.equal(round_trip(permuted(order), x), round_trip(codec_spec(**PLAIN).build(HEAD_DIM), x))


def test_groups_are_the_named_channels_of_all_heads(numbers):
    """Against quantizing each group of named channels by itself."""
    x = numbers(1, 5)
    order = torch.randperm(HEADS * HEAD_DIM, generator=torch.Generator().manual_seed(1)).view(HEADS, HEAD_DIM)
    found = round_trip(permuted(order), x)
    flat, expected = x.transpose(1, 2).flatten(2), torch.empty(1, 5, HEADS * HEAD_DIM, dtype=torch.float64)
    one = codec_spec(**PLAIN).build(16)
    for group in order.view(-1, 16):
        expected[..., group] = round_trip(one, flat[..., group])
    assert torch.equal(found.transpose(1, 2).flatten(2), expected)


def test_like_channels_together_lose_less(numbers):
    x = numbers(1, 64)
    spread = x.amax(2) - x.amin(2)
    order = spread.flatten().argsort().view(HEADS, HEAD_DIM)
    plain = codec_spec(**PLAIN).build(HEAD_DIM)
    assert (round_trip(permuted(order), x) - x).norm() < 0.9 * (round_trip(plain, x) - x).norm()
