"""Token lengths: TurboQuant and OScaR against their definitions in float64."""

import pytest
import torch

from kvq.codecs import codec_spec
from kvq.codecs.levels import lloyd_max
from kvq.transforms.hadamard_matrix import hadamard_matrix


def codec_of(head_dim, heads=1, **settings):
    return codec_spec(**settings).build(head_dim, {}, heads)


def round_trip(codec, x):
    return codec.decode(codec.encode(x), torch.float64)


def turboquant(bits, correct=None, head_dim=64):
    return codec_of(
        head_dim, codec="book", bits=bits, levels="lloyd_max", scale="unit", norm={"over": "head", "correct": correct}
    )


def half(x):
    return x.half().double()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("correct", [None, "length"])
def test_turboquant_is_its_definition(bits, correct):
    """x / ||x||, the nearest level of each coordinate for variance 1 / d, times the length (algorithm 1)."""
    d = 64
    x = torch.randn(33, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5
    levels = lloyd_max(bits) / d**0.5
    expected = torch.empty_like(x)
    for i, vector in enumerate(x):
        norm = vector.norm()
        unit = vector / (half(norm / d**0.5) * d**0.5 if correct is None else norm)
        decoded = torch.stack([levels[(levels - u).abs().argmin()] for u in unit])
        if correct is None:
            expected[i] = decoded * half(norm / d**0.5) * d**0.5
        else:
            expected[i] = decoded * d**0.5 * half(norm / (decoded.norm() * d**0.5))
    assert torch.allclose(round_trip(turboquant(bits, correct), x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_error_on_random_directions_is_that_of_lloyd_max(bits):
    x = torch.randn(4000, 128, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x *= torch.rand(4000, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 100
    error = (round_trip(turboquant(bits, head_dim=128), x) - x).square().sum(-1) / x.square().sum(-1)
    # A unit vector's coordinates are a little less spread than normal ones.
    assert error.mean().item() == pytest.approx({2: 0.1175, 3: 0.0345, 4: 0.0095}[bits], rel=0.03)


def test_one_hot_under_a_hadamard_rotation_needs_the_correction():
    """All coordinates are +-1 / sqrt(d): relative error (1.5104 - 1)^2 without it, next to nothing with it."""
    x = torch.eye(64, dtype=torch.float64) @ hadamard_matrix(64) * 3

    def error(correct):
        return ((round_trip(turboquant(2, correct), x) - x).square().sum() / x.square().sum()).item()

    assert error(None) == pytest.approx((1.5104 - 1) ** 2, rel=2e-3)
    assert error("length") < 1e-6
    assert error("least_squares") < 1e-6


@pytest.mark.parametrize("over", ["head", "token"])
def test_corrections_do_what_they_say(numbers, over):
    x = numbers(2, 64)
    settings = {"codec": "affine", "bits": 2, "axis": "channel", "group": 32}
    dims = -1 if over == "head" else (1, 3)

    def trip(correct):
        return round_trip(codec_of(32, 3, **settings, norm={"over": over, "correct": correct}), x)

    length, least = trip("length"), trip("least_squares")
    assert torch.allclose(length.square().sum(dims), x.square().sum(dims), rtol=2e-3)
    # The projection leaves a residual at right angles to what was decoded.
    inner = ((x - least) * least).sum(dims) / least.square().sum(dims)
    assert inner.abs().max() < 1e-3
    assert (least - x).square().sum() <= min((length - x).square().sum(), (trip(None) - x).square().sum())


def test_factoring_is_dividing_by_the_length_over_all_heads(numbers):
    """OScaR: keys over their token's length, per channel in groups of tokens, times the length."""
    x = numbers(1, 64)
    norm = half(x.square().mean((1, 3), keepdim=True).sqrt())
    plain = {"codec": "affine", "bits": 2, "axis": "channel", "group": 32}
    expected = round_trip(codec_of(32, 3, **plain), x / norm) * norm
    assert torch.allclose(round_trip(codec_of(32, 3, **plain, norm={"over": "token"}), x), expected)


def test_it_helps_where_token_lengths_differ_within_a_channel_group(numbers):
    x = numbers(1, 64)
    x[:, :, ::5] *= 0.05
    plain = {"codec": "affine", "bits": 2, "axis": "channel", "group": 32}

    def relative(**more):
        error = (round_trip(codec_of(32, 3, **plain, **more), x) - x).square().sum((1, 3))
        return (error / x.square().sum((1, 3))).mean()

    assert relative(norm={"over": "token"}) < 0.5 * relative()
