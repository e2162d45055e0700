"""Differences of paired numbers: a recipe beside its baseline on the same requests, with an error that can be trusted.

Requests that share a text are not independent, so errors are taken over units (windows, texts, documents). Two answers
to one question differ much less than two questions do: a paired error is far below that of either score alone.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist, fmean
from typing import Any

import numpy as np

# Two-sided, for wording; and one-sided, for a gate.
CONFIDENCE = 0.95
# Units left out together when a statistic is jackknifed: more blocks cost time and change little.
BLOCKS = 200
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(100)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """recipe - baseline: its estimate, its standard error over ``units`` (None: one unit says nothing of an error), and
    whether every single pair of numbers was equal."""

    value: float
    stderr: float | None
    units: int
    identical: bool = False

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        """The 95% interval; None, None without an error."""
        return self.interval() if self.stderr is not None else (None, None)

    def interval(self, confidence: float = CONFIDENCE, *, one_sided: bool = False) -> tuple[float, float]:
        """Bounds that hold with this confidence, each for itself if ``one_sided``; infinite without an error."""
        if self.stderr is None:
            return -math.inf, math.inf
        tail = (1 - confidence) if one_sided else (1 - confidence) / 2
        margin = student_quantile(1 - tail, self.units - 1) * self.stderr if self.stderr else 0.0
        return self.value - margin, self.value + margin


@dataclass(frozen=True, kw_only=True)
class Flips:
    """Of ``answers`` that are right or wrong: those ``lost``, that only the baseline has right, and those ``won``."""

    lost: int
    won: int
    answers: int

    @property
    def rate(self) -> float:
        """Share of the answers that changed between right and wrong."""
        return (self.lost + self.won) / self.answers


def mean_difference(values: Sequence[float], baseline: Sequence[float]) -> Difference:
    """Mean of values - baseline, one number a unit."""
    return mean_of([a - b for a, b in zip(values, baseline, strict=True)])


def mean_of(values: Sequence[float]) -> Difference:
    """Mean of one number a unit, with its standard error."""
    count, mean, identical = len(values), fmean(values), not any(values)
    if count < 2:
        return Difference(value=mean, stderr=None, units=count, identical=identical)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Difference(value=mean, stderr=math.sqrt(variance / count), units=count, identical=identical)


def share_difference(right: Sequence[bool], baseline: Sequence[bool]) -> Difference:
    """Difference of two paired shares, such as accuracies.

    The estimate is the plain one. Its error counts half a flip more in each direction (Agresti and Min 2005, "Simple
    improved confidence intervals for comparing matched proportions"): no flip among ten answers is no proof that there
    are none.
    """
    found, count = flips(right, baseline), len(right)
    changed, value = found.lost + found.won, (found.won - found.lost) / count
    if count < 2:
        return Difference(value=value, stderr=None, units=count, identical=not changed)
    more = count + 2
    variance = (changed + 1) / more - ((found.won - found.lost) / more) ** 2
    return Difference(value=value, stderr=math.sqrt(variance / more), units=count, identical=not changed)


def flips(right: Sequence[bool], baseline: Sequence[bool]) -> Flips:
    """Answers, at least one, that changed between right and wrong."""
    pairs = [(bool(a), bool(b)) for a, b in zip(right, baseline, strict=True)]
    lost, won = sum(b and not a for a, b in pairs), sum(a and not b for a, b in pairs)
    return Flips(lost=lost, won=won, answers=len(pairs))


def jackknife_difference(
    values: Sequence[Any], baseline: Sequence[Any], statistic: Callable[[list[Any]], float]
) -> Difference:
    """Difference of a statistic that is no mean, such as a perplexity: the units are left out of both sides in turn."""
    pairs = list(zip(values, baseline, strict=True))
    found = jackknife(pairs, lambda kept: statistic([a for a, _ in kept]) - statistic([b for _, b in kept]))
    return replace(found, identical=all(a == b for a, b in pairs))


def jackknife(values: Sequence[Any], statistic: Callable[[list[Any]], float]) -> Difference:
    """Any statistic of the units with its standard error: they (blocks of them, where there are many) are left out in
    turn (Quenouille 1956; Tukey 1958)."""
    count = len(values)
    whole = statistic(list(values))
    if count < 2:
        return Difference(value=whole, stderr=None, units=count)
    blocks = min(count, BLOCKS)
    found = [statistic([value for i, value in enumerate(values) if i % blocks != block]) for block in range(blocks)]
    mean = fmean(found)
    variance = (blocks - 1) / blocks * math.fsum((value - mean) ** 2 for value in found)
    return Difference(value=whole, stderr=math.sqrt(variance), units=blocks)


@functools.lru_cache(maxsize=256)
def student_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t distribution, by bisection on its integrated density; probability in (0.5, 1).

    Above 500 degrees of freedom it is the normal one, which differs by less than 0.5% there.
    """
    if freedom > 500:
        return NormalDist().inv_cdf(probability)
    low, high = 0.0, 1.0
    while _student_tail(high, freedom) > 1 - probability:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_tail(middle, freedom) > 1 - probability else (low, middle)
    return (low + high) / 2


def _student_tail(t: float, freedom: int) -> float:
    """P(T > t): with t = sqrt(freedom) * tan(a) the density becomes c * cos(a)**(freedom - 1), integrated from a to a
    right angle by Gauss and Legendre's rule."""
    half = (math.pi / 2 - math.atan(t / math.sqrt(freedom))) / 2
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    return scale * half * float(_WEIGHTS @ (np.sin(half * (1 + _NODES)) ** (freedom - 1)))


# What a difference is called; ``worse`` and ``better`` only where the interval excludes 0.
SAME, WORSE, BETTER, UNCLEAR = "same", "worse", "better", "too few samples to tell"


def verdict(difference: Difference, higher_is_better: bool) -> str:
    """``same`` if two units or more gave equal numbers throughout; ``worse`` or ``better`` if the 95% interval excludes
    0; else ``too few samples to tell``."""
    if difference.identical and difference.units > 1:
        return SAME
    low, high = difference.interval()
    if low > 0 or high < 0:
        return BETTER if (difference.value > 0) == higher_is_better else WORSE
    return UNCLEAR
