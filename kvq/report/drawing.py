"""Drawing with matplotlib: one figure gives inline SVG, for light and dark pages, and PNG. Needs the extra ``report``.

Colours are those of the style sheet (``templates/page.css``). matplotlib draws with their values for light pages; SVG
has the sheet's variables in their places, so that one drawing serves light and dark. Texts stay texts. The same data
give the same bytes.
"""

import io
import math
import re
from collections.abc import Callable, Sequence
from html import escape, unescape
from importlib import resources

from markupsafe import Markup

from kvq.errors import KvqError

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap, to_hex
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import LogLocator, MaxNLocator
except ImportError:
    raise KvqError("pages and pictures are drawn by matplotlib: pip install 'kvq-toolkit[report]'.") from None

_SHEET = resources.files("kvq.report.templates").joinpath("page.css").read_text()
COLOURS = {name: to_hex(value) for name, value in re.findall(r"--([\w-]+): (#\w+)", _SHEET[: _SHEET.index("}")])}
SERIES = tuple(COLOURS[f"c{i}"] for i in range(8))
# Cells of heat maps keep their colours on dark pages, and with them the texts in them.
_VARIABLES = {value: f"var(--{name})" for name, value in COLOURS.items() if not name.startswith("cell")}
_GOODNESS = LinearSegmentedColormap.from_list("goodness", [COLOURS["cell-bad"], COLOURS["cell-good"]])
_HINT = "hint:"

# A function with this decorator draws in the page's style, whatever a user's own matplotlib settings are.
styled = matplotlib.rc_context(
    {
        "font.family": ["DejaVu Sans"],
        "font.size": 10,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "figure.titlesize": 12,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "text.color": COLOURS["ink"],
        "axes.labelcolor": COLOURS["soft"],
        "xtick.color": COLOURS["soft"],
        "ytick.color": COLOURS["soft"],
        "axes.edgecolor": COLOURS["line"],
        "grid.color": COLOURS["line"],
        "axes.axisbelow": True,
        "axes.prop_cycle": matplotlib.cycler(color=SERIES),
        "legend.frameon": False,
        "svg.fonttype": "none",
    }
)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure; width and height in units of the SVG's view box, which are points (1/72 inch)."""
    figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def new_chart(x_label: str, y_label: str, width: float = 460, height: float = 300) -> tuple[Figure, Axes]:
    """A figure with one pair of axes, a grid and no frame."""
    figure = new_figure(width, height)
    axes = figure.subplots()
    axes.set_xlabel(x_label, fontsize=12)
    # Narrow pages write texts larger, so there is room between label and ticks.
    axes.set_ylabel(y_label, fontsize=12, labelpad=12)
    axes.tick_params(length=0, labelsize=11.5)
    axes.grid(linewidth=1)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure, axes


def hint(artist, text: str) -> None:
    """What the page says of a mark where the mouse rests on it, and to a screen reader."""
    artist.set_gid(_HINT + text)


def limits(values: Sequence[float], *, log: bool = False, zero: bool = False) -> tuple[float, float]:
    """Ends of an axis that holds the values with some room. ``zero``: it begins at 0."""
    low, high = min(values), max(values)
    if log:
        return low / 1.5, high * 1.5
    room = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    return 0.0 if zero else low - room, high + room


def log_scale(axis, ends: tuple[float, float]) -> None:
    """Make a matplotlib axis logarithmic between two ends, with a few ticks written short, such as 0.002 and 3e-4."""
    low, high = ends
    axis.axes.set(**{f"{axis.axis_name}scale": "log", f"{axis.axis_name}lim": ends})
    decades = math.log10(high / low)
    axis.set_major_locator(MaxNLocator(5) if decades < 1 else LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,)))
    axis.set_major_formatter(lambda value, _: short(value))
    axis.axes.minorticks_off()


def short(value: float) -> str:
    """0.3, 0.002, 3e-4: a tick has little room."""
    text = f"{value:g}" if not value or abs(value) >= 0.001 else f"{value:.0e}"
    return text.replace("e-0", "e-")


def place_labels(axes: Axes, labels: Sequence[tuple[float, float, str, str]]) -> None:
    """Labels (x, y, text, colour) beside their points, on the side with room, pushed apart where they would overlap.

    The limits of the axes must stand.
    """
    figure = axes.figure
    figure.draw_without_rendering()
    right = axes.get_window_extent().x1
    taken = []
    for x, y, text, colour in sorted(labels, key=lambda own: -own[1]):
        shift = 0.0
        label = axes.annotate(
            text, (x, y), (9, 0), textcoords="offset points", va="center", color=colour, fontsize=11.5, weight="bold"
        )
        on_left = label.get_window_extent().x1 > right
        if on_left:
            label.set_horizontalalignment("right")
        while True:
            label.xyann = (-9 if on_left else 9, shift)
            box = label.get_window_extent()
            if not any(box.overlaps(other) for other in taken):
                break
            shift -= 3
        taken.append(box)


@styled
def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    title: str,
    *,
    row_label: str,
    column_label: str,
    level: Callable[[float], float],
    hints: Callable[[int, int], str],
    text: Callable[[float], str] | None = None,
    cell: tuple[int, int] = (56, 30),
) -> Markup:
    """A grid of coloured cells as SVG.

    level   0 (bad) to 1 (good) of a value. text: what is written into its cell; None: nothing.
    """
    left, top, end = 58, 40, 8
    width, height = left + cell[0] * len(columns) + end, top + cell[1] * len(rows) + end
    figure = Figure(figsize=(width / 72, height / 72))
    axes = figure.add_axes((left / width, end / height, 1 - (left + end) / width, 1 - (top + end) / height))
    axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0))
    axes.set_xticks([c + 0.5 for c in range(len(columns))], columns)
    axes.set_yticks([r + 0.5 for r in range(len(rows))], rows)
    axes.tick_params(length=0, labelsize=11.5, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.xaxis.set_label_position("top")
    axes.set_xlabel(column_label, fontsize=12)
    axes.set_ylabel(row_label, fontsize=12)
    axes.yaxis.set_label_coords(-42 / (width - left - end), 0.5)
    axes.set_frame_on(False)
    gap = 1 / cell[0], 1 / cell[1]
    for r, line in enumerate(values):
        for c, value in enumerate(line):
            square = Rectangle((c + gap[0], r + gap[1]), 1 - 2 * gap[0], 1 - 2 * gap[1])
            axes.add_patch(square)
            if value is None:
                square.set_facecolor(COLOURS["track"])
                continue
            square.set_facecolor(_GOODNESS(max(0.0, min(1.0, level(value)))))
            hint(square, hints(r, c))
            if text is not None:
                at = (c + 0.5, r + 0.5)
                axes.text(*at, text(value), color=COLOURS["cell-ink"], size=11.5, weight=600, ha="center", va="center")
    return svg(figure, title)


@styled
def png(figure: Figure) -> bytes:
    """A PNG file on white."""
    buffer = io.BytesIO()
    # Without the version of matplotlib in it, the same picture has the same bytes.
    figure.savefig(buffer, format="png", dpi=110, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


@styled
def svg(figure: Figure, title: str) -> Markup:
    """An ``svg`` element for a page. ``title`` says to a screen reader what the drawing is.

    Names that parts refer to within the drawing depend on the title: titles on a page must differ.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": title}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", dpi=110, metadata=nothing)
    text = buffer.getvalue()
    box = re.search(r'viewBox="[^"]*?([\d.]+) ([\d.]+)"', text)
    # The body alone: the head is written below, and the style element would hold for the whole page.
    text = text[text.index("</style>") :]
    text = text[text.index("</defs>") + len("</defs>") :]
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    used = set(re.findall(r"#([\w-]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda own: own[0] if own[1].startswith(_HINT) or own[1] in used else "", text)
    text = re.sub(r"(?<=: )#[0-9a-f]{6}\b", lambda own: _VARIABLES.get(own[0], own[0]), text)
    text = re.sub(rf"<g id=([\"']){_HINT}(.*?)\1>", lambda own: _hinted(unescape(own[2])), text)
    text = re.sub(r">\s+<", "><", text)
    head = f'<svg class="chart" viewBox="0 0 {box[1]} {box[2]}" role="group" aria-label="{escape(title)}"'
    return Markup(f'{head} style="max-width:{1.25 * float(box[1]):.0f}px">{text.strip()}')


def _hinted(text: str) -> str:
    return f'<g role="img"><title>{escape(text, quote=False)}</title>'
