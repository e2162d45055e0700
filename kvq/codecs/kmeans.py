"""Codebooks from weighted numbers: exact k-means on a line, and KVQuant's Q-Norm."""

import itertools

import torch

from kvq.codecs.levels import midpoints


def levels_of(points: torch.Tensor, weights: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` ascending levels of least weighted squared error for points on a line, float64 [count].

    points    float64 [n], ascending.  weights   float64 [n], not negative, not all zero.

    A cluster on a line is a run of neighbours, so the best cut into runs is found by dynamic programming, without a
    start that could matter (k-means proper finds a local optimum). Memory grows as n^2. Levels beyond the number of
    different points repeat the last one.
    """
    held = weights > 0
    points, weights = points[held], weights[held]
    clusters = min(count, len(points))
    cost = _run_costs(points, weights).T.contiguous()
    best, cuts = cost[:, 0], []
    for _ in range(clusters - 1):
        # best[j]: points 0 to j in one run less; the next run begins after i < j.
        least, before = (best[:-1] + cost[:, 1:]).min(1)
        best = torch.where(torch.arange(len(points)) > 0, least, best)
        cuts.append(before)
    ends = [len(points)]
    for before in reversed(cuts):
        ends.append(int(before[ends[-1] - 1]) + 1)
    ends = [0, *ends[::-1]]
    found = [_mean(points[a:b], weights[a:b]) for a, b in itertools.pairwise(ends)]
    return torch.stack(found + found[-1:] * (count - clusters))


def _run_costs(points: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted squared error of points i to j around their mean, [n, n]; infinite where j < i."""

    def sums(x: torch.Tensor) -> torch.Tensor:
        total = torch.cat([x.new_zeros(1), x.cumsum(0)])
        return total[1:] - total[:-1, None]

    # About the middle, so that the difference of squares keeps its digits.
    x = points - _mean(points, weights)
    mass = sums(weights)
    cost = sums(weights * x * x) - sums(weights * x).square() / mass.clamp_min(torch.finfo(x.dtype).tiny)
    index = torch.arange(len(points))
    return cost.clamp_min(0).masked_fill(index < index[:, None], torch.inf)


def _mean(points: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (points * weights).sum() / weights.sum()


def q_norm(levels: torch.Tensor, points: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Levels moved so that decoded numbers have the mean and deviation of ``points``, each met ``counts`` times.

    KVQuant, section 3.5: levels * (s1 / s2) + (m1 - m2 * s1 / s2), with mean m1 and deviation s1 of the numbers, m2 and
    s2 of what they decode to. Numbers still go to the level that was nearest before.
    """
    decoded = levels[torch.bucketize(points, midpoints(levels))]
    (m1, s1), (m2, s2) = (_moments(x, counts) for x in (points, decoded))
    ratio = s1 / s2 if s2 > 0 else 1.0
    return levels * ratio + (m1 - m2 * ratio)


def _moments(x: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean = _mean(x, weights)
    return mean, _mean((x - mean).square(), weights).sqrt()
