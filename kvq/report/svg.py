"""Small charts as inline SVG: axes, lines, points, intervals and heat maps.

Colours and fonts come from classes that the page styles (``templates/page.css``), so that one drawing serves light
and dark. Everything is laid out in the units of a view box and scales with the page.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 72, 16, 14, 44


@dataclass(frozen=True, kw_only=True)
class Axis:
    """low to high, linear or logarithmic (both above 0); text: how a tick is written."""

    low: float
    high: float
    label: str
    log: bool = False
    text: Callable[[float], str] = lambda value: _short(value)

    @classmethod
    def around(cls, values: Sequence[float], label: str, *, log: bool = False, zero: bool = False, text=None) -> "Axis":
        """An axis that holds the values with some room. ``zero``: it begins at 0."""
        low, high = min(values), max(values)
        if log:
            low, high = low / 1.5, high * 1.5
        else:
            room = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
            low, high = (0.0 if zero else low - room), high + room
        extra = {"text": text} if text else {}
        return cls(low=low, high=high, label=label, log=log, **extra)

    def at(self, value: float) -> float:
        """0 at ``low``, 1 at ``high``."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values within the axis."""
        if self.log:
            return self._log_ticks(most)
        raw = (self.high - self.low) / most
        power = 10 ** math.floor(math.log10(raw))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [round(i * step, 12) for i in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def _log_ticks(self, most: int) -> list[float]:
        low, high = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        for factors in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 5), (1, 3), (1,)):
            found = [factor * 10.0**power for power in range(low, high + 1) for factor in factors]
            found = [value for value in found if self.low <= value <= self.high]
            if len(found) <= most:
                return found or [self.low, self.high]
        return found[:: math.ceil(len(found) / most)]


def _short(value: float) -> str:
    """0.3, 0.002, 3e-4: a tick has little room."""
    text = f"{value:g}" if not value or abs(value) >= 0.001 else f"{value:.0e}"
    return text.replace("e-0", "e-")


@dataclass
class Plot:
    """A chart with two axes. ``series`` in the drawing methods is the number of a colour."""

    x: Axis
    y: Axis
    title: str
    width: int = WIDTH
    height: int = HEIGHT
    x_ticks: Sequence[float] | None = None
    _marks: list[str] = field(default_factory=list)
    _labels: list[tuple[float, float, str, int]] = field(default_factory=list)

    def px(self, value: float) -> float:
        return LEFT + (self.width - LEFT - RIGHT) * self.x.at(value)

    def py(self, value: float) -> float:
        return TOP + (self.height - TOP - BOTTOM) * (1 - self.y.at(value))

    def line(self, points: Sequence[tuple[float, float]], series: int, *, dashed: bool = False) -> None:
        path = " ".join(f"{self.px(x):.1f},{self.py(y):.1f}" for x, y in points)
        kind = "line dashed" if dashed else "line"
        self._marks.append(f'<polyline class="{kind} s{series}" points="{path}"/>')

    def point(self, x: float, y: float, series: int, hint: str, label: str = "") -> None:
        at = f'cx="{self.px(x):.1f}" cy="{self.py(y):.1f}"'
        self._marks.append(f'<circle class="point s{series}" {at} r="4.5"><title>{escape(hint)}</title></circle>')
        if label:
            self._labels.append((self.px(x), self.py(y), label, series))

    def interval(self, x: float, low: float, high: float, series: int) -> None:
        """A vertical error bar, cut off at the axis."""
        low, high = max(low, self.y.low), min(high, self.y.high)
        if low < high:
            ends = f'x1="{self.px(x):.1f}" x2="{self.px(x):.1f}" y1="{self.py(low):.1f}" y2="{self.py(high):.1f}"'
            self._marks.append(f'<line class="error s{series}" {ends}/>')

    def level(self, y: float) -> None:
        """A horizontal line of reference."""
        ends = f'x1="{LEFT}" x2="{self.width - RIGHT}" y1="{self.py(y):.1f}" y2="{self.py(y):.1f}"'
        self._marks.append(f'<line class="reference" {ends}/>')

    def svg(self) -> str:
        parts = [*self._axes(), *self._marks, *self._placed_labels()]
        return _svg(self.width, self.height, self.title, parts)

    def _axes(self) -> list[str]:
        bottom, right = self.height - BOTTOM, self.width - RIGHT
        parts = []
        for value in self.y.ticks():
            y = self.py(value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(_text(LEFT - 7, y + 4, self.y.text(value), "tick end"))
        for value in self.x_ticks if self.x_ticks is not None else self.x.ticks():
            x = self.px(value)
            parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
            parts.append(_text(x, bottom + 17, self.x.text(value), "tick middle"))
        parts.append(_text((LEFT + right) / 2, self.height - 8, self.x.label, "axis middle"))
        middle = (TOP + bottom) / 2
        turned = f'transform="rotate(-90 13 {middle:.1f})"'
        parts.append(_text(13, middle, self.y.label, "axis middle", turned))
        return parts

    def _placed_labels(self) -> list[str]:
        """Labels beside their points, on the side with room, pushed apart where they would overlap."""
        found, taken = [], []
        for x, y, label, series in sorted(self._labels, key=lambda own: own[1]):
            width = 7 * len(label) + 6
            on_left = x + 9 + width > self.width - RIGHT
            start = x - 9 - width if on_left else x + 9
            place = y + 4
            while any(abs(place - other) < 13 and start < end and start + width > begin for other, begin, end in taken):
                place += 13
            taken.append((place, start, start + width))
            anchor = "label end" if on_left else "label"
            found.append(_text(x - 9 if on_left else x + 9, place, label, f"{anchor} t{series}"))
        return found


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    title: str,
    *,
    row_label: str,
    column_label: str,
    text: Callable[[float], str],
    level: Callable[[float], float],
    hint: Callable[[int, int], str],
    cell: tuple[int, int] = (56, 30),
    show: bool = True,
) -> str:
    """A grid of coloured cells. ``level``: 0 (bad) to 1 (good) of a value; ``text`` is written into its cell."""
    left, top = 58, 36
    width, height = left + cell[0] * len(columns) + 8, top + cell[1] * len(rows) + 8
    parts = [_text(left + cell[0] * len(columns) / 2, 13, column_label, "axis middle")]
    middle = top + cell[1] * len(rows) / 2
    parts.append(_text(13, middle, row_label, "axis middle", f'transform="rotate(-90 13 {middle:.1f})"'))
    for c, name in enumerate(columns):
        parts.append(_text(left + cell[0] * (c + 0.5), top - 7, name, "tick middle"))
    for r, name in enumerate(rows):
        y = top + cell[1] * r
        parts.append(_text(left - 7, y + cell[1] / 2 + 4, name, "tick end"))
        for c, value in enumerate(values[r]):
            x = left + cell[0] * c
            shape = f'x="{x + 1}" y="{y + 1}" width="{cell[0] - 2}" height="{cell[1] - 2}" rx="3"'
            if value is None:
                parts.append(f'<rect class="cell empty" {shape}/>')
                continue
            share = max(0.0, min(1.0, level(value)))
            style = f'style="--level:{100 * share:.0f}%"'
            parts.append(f'<rect class="cell" {shape} {style}><title>{escape(hint(r, c))}</title></rect>')
            if show:
                parts.append(_text(x + cell[0] / 2, y + cell[1] / 2 + 4, text(value), "value middle"))
    return _svg(width, height, title, parts)


def interval_bar(value: float, low: float | None, high: float | None, reach: float, verdict: str, title: str) -> str:
    """A difference and its interval on a line from -reach to reach, with 0 in the middle."""
    width, height = 132, 18
    at = lambda number: width / 2 + (width / 2 - 6) * max(-1.0, min(1.0, number / reach))  # noqa: E731
    kind = {"worse": "bad", "better": "good"}.get(verdict, "plain")
    parts = [f'<line class="zero" x1="{width / 2}" x2="{width / 2}" y1="1" y2="{height - 1}"/>']
    if low is not None and high is not None:
        ends = f'x1="{at(low):.1f}" x2="{at(high):.1f}" y1="{height / 2}" y2="{height / 2}"'
        parts.append(f'<line class="whisker {kind}" {ends}/>')
    parts.append(f'<circle class="dot {kind}" cx="{at(value):.1f}" cy="{height / 2}" r="4"/>')
    return _svg(width, height, title, parts, "interval")


def _text(x: float, y: float, content: str, kind: str, extra: str = "") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" {extra}>{escape(content)}</text>'


def _svg(width: float, height: float, title: str, parts: Sequence[str], kind: str = "chart") -> str:
    head = f'<svg class="{kind}" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}"'
    return f'{head} style="max-width:{1.25 * width:g}px">{"".join(parts)}</svg>'
