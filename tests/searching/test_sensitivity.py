"""Between measurements: a power law is met exactly, families keep their own ratio, and what is chosen gets measured."""

import pytest

from kvq.codecs import codec_spec
from kvq.searching.sensitivity import Sensitivity, between
from kvq.searching.space import Option


def option(name, family):
    codec = codec_spec(codec="affine", bits=4, axis="token", group="head")
    return Option(side="key", name=name, family=family, codec=codec)


def test_a_power_law_is_met_between_and_a_constant_ratio_beyond():
    points = [(1.0, 2.0), (4.0, 16.0)]
    assert between(points, 2.0) == pytest.approx(2 * 2.0**1.5)
    assert between(points, 8.0) == pytest.approx(8 * 4.0)
    assert between(points, 0.5) == pytest.approx(0.5 * 2.0)
    assert between([(2.0, 6.0)], 5.0) == pytest.approx(15.0)


def test_nothing_breaks_at_zero():
    assert between([(0.0, 0.0), (1.0, 1.0)], 0.0) >= 0
    assert between([(1.0, 0.0)], 1.0) < 1e-20


def test_a_family_keeps_its_own_ratio_of_damage_to_error():
    errors = {"a1": 1.0, "a2": 2.0, "b1": 1.0, "b2": 2.0, "c": 1.0}
    measured = {option("a1", "a"): 1.0, option("b1", "b"): 10.0}
    assert Sensitivity._damage(option("a2", "a"), errors, measured) == pytest.approx(2.0)
    assert Sensitivity._damage(option("b2", "b"), errors, measured) == pytest.approx(20.0)
    assert Sensitivity._damage(option("a1", "a"), errors, measured) == 1.0
    # A family without a measurement borrows.
    assert 1.0 <= Sensitivity._damage(option("c", "c"), errors, measured) <= 10.0
