"""Paired differences against independent references: scipy's quantiles, and the coverage of intervals by simulation."""

import math
import random
import statistics

import pytest

from kvq.eval.paired import (
    Difference,
    Flips,
    flips,
    jackknife_difference,
    mean_difference,
    share_difference,
    student_quantile,
    verdict,
)
from kvq.eval.result import MetricResult


@pytest.mark.parametrize("freedom", [1, 2, 3, 5, 10, 37, 150, 500, 501])
@pytest.mark.parametrize("probability", [0.9, 0.95, 0.975, 0.995])
def test_quantiles_are_those_of_students_distribution(freedom, probability):
    scipy = pytest.importorskip("scipy.stats", reason="scipy, the reference, comes with lm-eval")
    assert student_quantile(probability, freedom) == pytest.approx(scipy.t.ppf(probability, freedom), rel=5e-3)
    if freedom <= 500:
        assert student_quantile(probability, freedom) == pytest.approx(scipy.t.ppf(probability, freedom), rel=1e-6)


def test_pairing_beats_two_unpaired_errors():
    draw = random.Random(0)
    base = [draw.gauss(3, 2) for _ in range(400)]
    values = [b + 0.1 + draw.gauss(0, 0.2) for b in base]
    found = mean_difference(values, base)
    assert found.value == pytest.approx(statistics.fmean(values) - statistics.fmean(base))
    assert found.stderr == pytest.approx(0.2 / 20, rel=0.2)
    unpaired = math.hypot(*(statistics.stdev(x) / 20 for x in (values, base)))
    assert found.stderr < unpaired / 5
    assert verdict(found, higher_is_better=False) == "worse"
    assert verdict(found, higher_is_better=True) == "better"


def test_intervals_cover_as_often_as_they_say():
    draw, hits, runs = random.Random(1), 0, 2000
    for _ in range(runs):
        low, high = mean_difference([draw.gauss(0.5, 1) for _ in range(4)], [0.0] * 4).interval()
        hits += low <= 0.5 <= high
    # Four units: a normal interval would cover 87% only.
    assert 0.93 < hits / runs < 0.97


def test_shares_count_flips_and_never_claim_certainty():
    right, base = [True] * 60 + [False] * 40, [True] * 64 + [False] * 36
    assert flips(right, base) == Flips(lost=4, won=0, answers=100)
    found = share_difference(right, base)
    assert found.value == pytest.approx(-0.04)
    # 4 and 0 flips, and half a flip more each, among 102.
    assert found.stderr == pytest.approx(math.sqrt((5 / 102 - (4 / 102) ** 2) / 102))
    for count in (3, 200):
        nothing = share_difference([True] * count, [True] * count)
        assert nothing.value == 0
        assert nothing.stderr == pytest.approx(math.sqrt(1 / (count + 2)) / math.sqrt(count + 2))
        # Of the answers given; the interval says how much a flip elsewhere is still possible.
        assert verdict(nothing, higher_is_better=True) == "same"
        assert nothing.interval()[0] < -1.5 / count
    assert verdict(share_difference([True, False, True], [True, True, False]), True) == "too few samples to tell"
    with pytest.raises(ValueError, match="longer"):
        flips([True], [True, False])


def test_a_score_that_stays_can_hide_flips():
    """Flip rate = changed answers / answers; the difference of the scores does not see what is lost and won alike."""
    right, base = [True, False, True, False, True], [False, True, True, False, True]
    found = flips(right, base)
    assert (found.lost, found.won, found.rate) == (1, 1, 0.4)
    assert share_difference(right, base).value == 0
    metric = MetricResult.of(0.6, 0.6, share_difference(right, base), higher_is_better=True, flips=found).to_dict()
    assert (metric["lost"], metric["won"], metric["flip_rate"]) == (1, 1, 0.4)
    assert flips(base, base).rate == 0
    # What is neither right nor wrong has no flips.
    assert (
        "flip_rate" not in MetricResult.of(1.0, 1.0, mean_difference([1, 2], [1, 3]), higher_is_better=True).to_dict()
    )


def test_share_intervals_cover_as_often_as_they_say():
    draw, hits, runs, lost = random.Random(2), 0, 1500, 0.08
    for _ in range(runs):
        base = [draw.random() < 0.6 for _ in range(60)]
        right = [b and draw.random() > lost for b in base]
        low, high = share_difference(right, base).interval()
        hits += low <= -0.6 * lost <= high
    assert hits / runs > 0.93


def test_a_jackknife_agrees_with_the_mean_and_serves_what_is_none():
    draw = random.Random(3)
    base = [draw.gauss(2, 1) for _ in range(90)]
    values = [b + draw.gauss(0.2, 0.3) for b in base]
    plain, jack = mean_difference(values, base), jackknife_difference(values, base, statistics.fmean)
    assert jack.value == pytest.approx(plain.value)
    assert jack.stderr == pytest.approx(plain.stderr)
    # exp of a mean: by the delta method its error is that of the mean times the value, where the baseline is fixed.
    perplexity = jackknife_difference(values, [0.0] * 90, lambda x: math.exp(statistics.fmean(x)))
    delta = math.exp(statistics.fmean(values)) * statistics.stdev(values) / math.sqrt(90)
    assert perplexity.stderr == pytest.approx(delta, rel=0.05)
    many = jackknife_difference(values * 11, base * 11, statistics.fmean)
    assert many.units == 200
    assert many.stderr == pytest.approx(plain.stderr / math.sqrt(11), rel=0.15)


def test_one_unit_says_nothing_of_an_error():
    for found in (
        mean_difference([1.0], [0.5]),
        share_difference([True], [False]),
        jackknife_difference([1.0], [0.5], sum),
    ):
        assert found.stderr is None
        assert found.interval() == (-math.inf, math.inf)
        assert verdict(found, higher_is_better=True) == "too few samples to tell"


def test_identical_numbers_are_called_the_same():
    found = mean_difference([1.5, 2.5, 3.5], [1.5, 2.5, 3.5])
    assert found == Difference(value=0.0, stderr=0.0, units=3, identical=True)
    assert verdict(found, higher_is_better=True) == "same"
    assert verdict(mean_difference([1.5, 2.5, 3.6], [1.5, 2.5, 3.5]), True) == "too few samples to tell"


def test_one_sided_bounds_are_tighter():
    found = Difference(value=0.0, stderr=1.0, units=10_000)
    assert found.interval()[1] == pytest.approx(1.96, abs=0.01)
    assert found.interval(one_sided=True)[1] == pytest.approx(1.645, abs=0.01)


def test_two_shares_differ_by_one_at_most():
    difference = share_difference([True, True], [True, True])
    assert difference.interval()[1] > 1
    metric = MetricResult.of(1.0, 1.0, difference, higher_is_better=True, flips=flips([True], [True]))
    assert (metric.low, metric.high) == (-1.0, 1.0)
    assert MetricResult.of(1.0, 1.0, difference, higher_is_better=True).high > 1
