"""Codebooks against published tables and against what defines them."""

import pytest
import torch

from kvq.codecs.levels import even, lloyd_max, make_levels, midpoints, normal_float, uniform

# QLoRA's NF4 table as bitsandbytes ships it, to float32.
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
# Max (1960), table I.
LLOYD_MAX = {
    1: [0.7979],
    2: [0.4528, 1.5104],
    3: [0.2451, 0.7560, 1.3439, 2.1519],
    4: [0.1284, 0.3880, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326],
}
DISTORTION = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_lloyd_max_levels_are_the_published_ones(bits):
    levels = lloyd_max(bits)
    assert torch.allclose(levels[len(levels) // 2 :], torch.tensor(LLOYD_MAX[bits], dtype=torch.float64), atol=6e-5)
    assert torch.equal(levels, -levels.flip(0))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_lloyd_max_error_on_normal_numbers_is_the_known_one(bits):
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    levels = lloyd_max(bits)
    nearest = levels[torch.bucketize(x, midpoints(levels))]
    assert (nearest - x).square().mean().item() == pytest.approx(DISTORTION[bits], rel=0.01)


# Max (1960), table II: distance of the levels and distortion of the best uniform quantizer.
EVEN = {1: (1.5958, 0.3634), 2: (0.9957, 0.1188), 3: (0.5860, 0.03744), 4: (0.3352, 0.01154)}


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_even_levels_are_those_of_the_best_uniform_quantizer(bits):
    levels, (step, distortion) = even(bits), EVEN[bits]
    assert torch.allclose(levels.diff(), torch.tensor(step, dtype=torch.float64), atol=6e-5)
    assert torch.equal(levels, -levels.flip(0))
    x = torch.linspace(-9, 9, 2_000_001, dtype=torch.float64)
    weight = torch.exp(-x.square() / 2)
    for factor, best in ((1.0, True), (1.02, False), (0.98, False)):
        named = levels * factor
        error = (named[torch.bucketize(x, midpoints(named))] - x).square()
        error = ((error * weight).sum() / weight.sum()).item()
        assert error == pytest.approx(distortion, rel=2e-3) if best else error > ((1 + 1e-6) * distortion)


def test_every_level_is_the_mean_of_what_goes_to_it():
    x = torch.linspace(-9, 9, 2_000_001, dtype=torch.float64)
    weight = torch.exp(-x.square() / 2)
    levels = lloyd_max(3)
    where = torch.bucketize(x, midpoints(levels))
    for i, level in enumerate(levels):
        own = where == i
        assert (x[own] * weight[own]).sum() / weight[own].sum() == pytest.approx(level.item(), abs=1e-5)


def test_nf4_is_the_published_table():
    assert torch.allclose(make_levels("normal_float", 4, True), torch.tensor(NF4, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_normal_float_has_an_exact_zero_and_one_level_more_above_it(bits):
    levels = normal_float(bits)
    assert len(levels) == 2**bits
    assert (levels > 0).sum() == (levels < 0).sum() + 1
    assert (levels == 0).sum() == 1
    assert (levels.diff() > 0).all()


def test_uniform_levels_are_evenly_spaced():
    assert torch.allclose(uniform(2), torch.tensor([-1, -1 / 3, 1 / 3, 1], dtype=torch.float64))
