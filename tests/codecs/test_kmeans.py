"""Exact k-means on a line against every possible cut, and Q-Norm against what it promises."""

import itertools

import pytest
import torch

from kvq.codecs.kmeans import levels_of, q_norm
from kvq.codecs.levels import lloyd_max, midpoints


def error(points, weights, levels):
    return float((weights * (points[:, None] - levels).square().amin(1)).sum())


def best_error(points, weights, count):
    """Over all cuts into at most ``count`` runs of neighbours."""
    n, best = len(points), float("inf")
    for cuts in itertools.combinations(range(1, n), min(count, n) - 1):
        total = 0.0
        for a, b in itertools.pairwise([0, *cuts, n]):
            mass = weights[a:b].sum()
            if mass > 0:
                mean = (points[a:b] * weights[a:b]).sum() / mass
                total += float((weights[a:b] * (points[a:b] - mean).square()).sum())
        best = min(best, total)
    return best


@pytest.mark.parametrize(("n", "count"), [(7, 3), (9, 4), (6, 2), (5, 5), (4, 8), (8, 1)])
def test_no_cut_is_better(n, count):
    generator = torch.Generator().manual_seed(n)
    for _ in range(20):
        points = torch.rand(n, generator=generator, dtype=torch.float64).sort().values * 10 - 3
        weights = torch.rand(n, generator=generator, dtype=torch.float64)
        weights[1:] *= torch.rand(n - 1, generator=generator) > 0.2
        levels = levels_of(points, weights, count)
        assert len(levels) == count
        assert (levels.diff() >= 0).all()
        assert error(points, weights, levels) == pytest.approx(best_error(points, weights, count), abs=1e-12)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_normal_weights_give_the_levels_of_lloyd_and_max(bits):
    points = (torch.arange(512, dtype=torch.float64) + 0.5) / 256 * 4.5 - 4.5
    found = levels_of(points, torch.exp(-points.square() / 2), 2**bits)
    assert torch.allclose(found, lloyd_max(bits), atol=0.02)


def test_weights_pull_levels_to_where_they_are():
    points = torch.linspace(-1, 1, 64, dtype=torch.float64)
    even = levels_of(points, torch.ones(64, dtype=torch.float64), 4)
    skewed = levels_of(points, torch.where(points > 0, 100.0, 1.0).double(), 4)
    assert torch.allclose(even, torch.tensor([-0.75, -0.25, 0.25, 0.75], dtype=torch.float64), atol=0.02)
    assert (skewed > 0).all()


@pytest.mark.parametrize("bits", [2, 3])
def test_q_norm_gives_decoded_numbers_the_mean_and_deviation_of_the_exact_ones(bits):
    points = torch.linspace(-1, 1, 512, dtype=torch.float64)
    counts = torch.exp(-(points - 0.2).square() / 0.1)
    levels = levels_of(points, counts, 2**bits)
    moved = q_norm(levels, points, counts)
    decoded = moved[torch.bucketize(points, midpoints(levels))]

    def moments(x):
        mean = (x * counts).sum() / counts.sum()
        return mean, ((x - mean).square() * counts).sum() / counts.sum()

    for found, expected in zip(moments(decoded), moments(points)):
        assert found.item() == pytest.approx(expected.item(), abs=1e-12)
    # Least error pulls levels inwards, so Q-Norm spreads them.
    assert moved[-1] - moved[0] > levels[-1] - levels[0]


def test_q_norm_of_numbers_at_one_place_moves_nothing():
    points, counts = torch.linspace(-1, 1, 4, dtype=torch.float64), torch.tensor([0, 1.0, 0, 0], dtype=torch.float64)
    levels = levels_of(points, counts, 4)
    assert torch.allclose(q_norm(levels, points, counts), levels)
