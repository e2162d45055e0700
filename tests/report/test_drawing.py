"""Drawings: ticks, marks where their numbers are, texts that stay texts, and the same bytes for the same data."""

import re

import pytest

from kvq.report.drawing import (
    COLOURS,
    SERIES,
    heat_map,
    hint,
    limits,
    log_scale,
    new_chart,
    place_labels,
    png,
    short,
    styled,
    svg,
)


@styled
def chart(points, labels=()):
    figure, axes = new_chart("bits <per> element", "loss & error")
    for x, y in points:
        (mark,) = axes.plot(x, y, "o", color=SERIES[0])
        hint(mark, f'"{x}" <b>&</b> {y}')
    place_labels(axes, labels)
    return figure


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(("low", "high"), [(0.001, 0.0013), (0.02, 3.0), (1.0, 1.0), (2e-5, 900.0), (0.0002, 0.04)])
def test_ticks_lie_on_the_axis_are_few_and_differ(low, high, log):
    figure, axes = new_chart("x", "y")
    ends = limits([low, high], log=log)
    assert ends[0] < low <= high < ends[1]
    if log:
        log_scale(axes.yaxis, ends)
    else:
        axes.set_ylim(ends)
    figure.draw_without_rendering()
    ticks = [tick for tick in axes.get_yticks() if ends[0] <= tick <= ends[1]]
    assert 2 <= len(ticks) <= 10
    written = [label.get_text() for tick, label in zip(axes.get_yticks(), axes.get_yticklabels()) if tick in ticks]
    assert len(set(written)) == len(written)
    assert (axes.get_yscale() == "log") is log


def test_numbers_are_written_short():
    assert [short(value) for value in (0.0003, 0.002, 0.3, 20.0, 0.0)] == ["3e-4", "0.002", "0.3", "20", "0"]


def test_points_are_where_their_numbers_are():
    text = svg(chart([(0, 0), (10, 1), (5, 0.5)]), "title")
    (left, bottom), (right, top), (x, y) = [
        tuple(map(float, own)) for own in re.findall(r'<use xlink:href="#\w+" x="([\d.]+)" y="([\d.]+)"', text)
    ]
    assert left < x < right
    assert top < y < bottom
    assert x == pytest.approx((left + right) / 2, abs=0.1)
    assert y == pytest.approx((top + bottom) / 2, abs=0.1)


def test_texts_stay_texts_and_are_escaped():
    text = svg(chart([(1, 2)]), 'a "title" <i>')
    assert ">bits &lt;per&gt; element</text>" in text
    assert ">loss &amp; error</text>" in text
    assert '<g role="img"><title>"1" &lt;b&gt;&amp;&lt;/b&gt; 2</title>' in text
    assert 'aria-label="a &quot;title&quot; &lt;i&gt;"' in text


def test_the_same_data_give_the_same_bytes_and_no_date_or_address():
    one, other = (chart([(1, 2), (3, 4)]) for _ in range(2))
    assert svg(one, "title") == svg(other, "title")
    assert png(one) == png(other)
    assert "http" not in svg(one, "title")
    assert not re.search(r"20\d\d-\d\d|[Mm]atplotlib", svg(one, "title"))
    assert b"atplotlib" not in png(one)


def test_names_within_drawings_of_a_page_differ():
    names = [set(re.findall(r'id="(\w+)"', svg(chart([(1, 2)]), title))) for title in ("one", "other")]
    assert names[0]
    assert not names[0] & names[1]


def test_colours_are_variables_of_the_page_on_which_they_become_dark():
    text = svg(chart([(1, 2)]), "title")
    assert "fill: var(--c0)" in text
    assert "var(--line)" in text
    assert not re.findall("#[0-9a-f]{6}", text.replace("xlink:href", ""))
    assert len({COLOURS[f"c{i}"] for i in range(8)}) == 8


def test_labels_of_points_at_one_place_are_pushed_apart():
    figure = chart(
        [(0, 0), (1, 1)], [(0.5, 0.5, name, "red") for name in ("one", "two", "three")] + [(1, 1, "wide", "red")]
    )
    boxes = [label.get_window_extent() for label in figure.axes[0].texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    right = figure.axes[0].get_window_extent().x1
    assert all(box.x1 <= right for box in boxes)


def test_cells_show_their_values_and_missing_ones_are_empty():
    settings = {"row_label": "depth", "column_label": "tokens", "level": float, "hints": lambda r, c: f"<{r}, {c}>"}
    text = heat_map(["1"], ["a", "b", "c"], [[1.0, None, 0.0]], "title", text="{:.0%}".format, **settings)
    assert re.findall("<title>(.*?)</title>", text) == ["&lt;0, 0&gt;", "&lt;0, 2&gt;"]
    assert text.count("fill: var(--track)") == 1
    for word in ("depth", "tokens", "a", "b", "c", "1", "100%", "0%"):
        assert f">{word}</text>" in text
    for end in ("cell-good", "cell-bad"):
        assert f"fill: {COLOURS[end]}" in text
    assert ">50%</text>" not in heat_map(["1"], ["a"], [[0.5]], "title", **settings)
