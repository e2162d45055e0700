"""Axes, ticks and marks."""

import re

import pytest

from kvq.report.svg import Axis, Plot, heat_map, interval_bar


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(("low", "high"), [(0.001, 0.0013), (0.02, 3.0), (1.0, 1.0), (2e-5, 900.0)])
def test_ticks_lie_on_the_axis_and_are_few(low, high, log):
    axis = Axis.around([low, high], "x", log=log)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 8
    assert ticks == sorted(set(ticks))
    assert all(0 <= axis.at(tick) <= 1 for tick in ticks)
    assert all(0 < axis.at(value) < 1 for value in (low, high))


def test_ticks_are_written_short_and_differ():
    axis = Axis.around([2e-5, 0.9], "x", log=True)
    texts = [axis.text(tick) for tick in axis.ticks()]
    assert len(set(texts)) == len(texts)
    assert max(map(len, texts)) <= 6
    assert axis.text(0.0003) == "3e-4"
    assert axis.text(0.002) == "0.002"


def test_points_are_where_their_numbers_are():
    plot = Plot(Axis.around([0, 10], "x"), Axis.around([0, 1], "y"), "title")
    for x, y in ((0, 0), (10, 1), (5, 0.5)):
        plot.point(x, y, 0, "hint")
    found = [tuple(map(float, own)) for own in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', plot.svg())]
    (left, bottom), (right, top), (x, y) = found
    assert left < x < right
    assert top < y < bottom
    assert x == pytest.approx((left + right) / 2, abs=0.1)
    assert y == pytest.approx((top + bottom) / 2, abs=0.1)


def test_an_interval_bar_shows_its_side():
    svg = interval_bar(-2.0, -3.0, -1.0, 4.0, "worse", "difference")
    ends = [float(own) for own in re.findall(r'whisker bad" x1="([\d.]+)" x2="([\d.]+)"', svg)[0]]
    assert ends[0] < ends[1] < 132 / 2
    assert "whisker" not in interval_bar(1.0, None, None, 4.0, "", "difference")


def test_missing_cells_are_empty():
    settings = {"row_label": "r", "column_label": "c", "text": str, "level": float, "hint": lambda r, c: "<&>"}
    svg = heat_map(["1"], ["a", "b"], [[1.0, None]], "title", **settings)
    assert svg.count("cell empty") == 1
    assert "--level:100%" in svg
    assert "&lt;&amp;&gt;" in svg
