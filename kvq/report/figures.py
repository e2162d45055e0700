"""Pictures of what calibration measured and what a recipe makes of it, as PNG bytes. Needs the extra ``report``."""

import io
from collections.abc import Mapping, Sequence

import torch

from kvq.errors import KvqError

try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
except ImportError:
    raise KvqError(
        "pictures need matplotlib: pip install 'kvq-toolkit[report]', or leave --html and --png out."
    ) from None

NAMES = {"key": "keys", "value": "values"}
_MAP = "viridis"
# Magnitudes below this share of the largest are drawn like it.
_FLOOR = 1e-2


def channels_figure(magnitudes: Mapping[str, torch.Tensor], side: str, layers: Sequence[int], heads: int) -> bytes:
    """Largest magnitude of every channel (across) in every layer (down), a panel for each of ``magnitudes``.

    magnitudes   title -> [L, heads * D].
    """
    figure = _figure(6.2 * len(magnitudes) + 0.8, 1.9 + 0.13 * len(layers))
    panels = figure.subplots(1, len(magnitudes), squeeze=False)[0]
    # One scale for all panels, so that they compare.
    top = max(float(sizes.max()) for sizes in magnitudes.values())
    for panel, (title, sizes) in zip(panels, magnitudes.items()):
        image = _heat(panel, sizes, top)
        panel.set_title(title, loc="left", fontsize=10)
        panel.set_xlabel(f"channel ({heads} head{'s' if heads > 1 else ''} side by side)")
        _mark_heads(panel, heads, sizes.shape[1])
        _ticks(panel, layers)
        figure.colorbar(image, ax=panel, pad=0.02)
    panels[0].set_ylabel("layer")
    figure.suptitle(f"Largest magnitudes of {NAMES[side]} by channel and layer", x=0.01, ha="left")
    return _png(figure)


def tokens_figure(parts: Mapping[str, torch.Tensor], layer: int, real: bool) -> bytes:
    """|x| by token (down) and channel (across), a panel for each of ``parts``: title -> [T, K * D], two a row.

    real   whether these are tokens of a text, or drawn ones.
    """
    rows = -(-len(parts) // 2)
    figure = _figure(13.2, 0.6 + 3.3 * rows)
    panels = figure.subplots(rows, 2, squeeze=False).flatten()
    for panel, (title, x) in zip(panels, parts.items()):
        image = _heat(panel, x.abs(), float(x.abs().max()))
        panel.set_title(title, loc="left", fontsize=10)
        panel.set_xlabel("channel")
        panel.set_ylabel("token")
        figure.colorbar(image, ax=panel, pad=0.02)
    for panel in panels[len(parts) :]:
        panel.set_visible(False)
    what = "tokens of the text" if real else "tokens drawn by the measured distributions"
    figure.suptitle(f"Layer {layer}: magnitudes by token and channel ({what})", x=0.01, ha="left")
    return _png(figure)


def sinks_figure(share: torch.Tensor, layers: Sequence[int]) -> bytes:
    """Share of attention that each of the first positions gets, [L, positions], mean over heads."""
    figure = _figure(6.5, 1.9 + 0.13 * len(layers))
    panel = figure.subplots()
    image = panel.imshow(share.numpy(), aspect="auto", cmap=_MAP, vmin=0, vmax=1, interpolation="nearest")
    panel.set_xlabel("position in the text")
    panel.set_ylabel("layer")
    panel.set_xticks(range(share.shape[1]))
    _ticks(panel, layers)
    figure.colorbar(image, ax=panel, pad=0.02, label="share of attention")
    figure.suptitle("Attention sinks", x=0.01, ha="left")
    return _png(figure)


def massive_figure(peaks: Sequence[float], medians: Sequence[float], layers: Sequence[int]) -> bytes:
    """Largest and median magnitude of the hidden states that enter each layer."""
    figure = _figure(6.5, 3.4)
    panel = figure.subplots()
    panel.semilogy(layers, peaks, "o-", label="largest entry", color="tab:red", markersize=4)
    panel.semilogy(layers, medians, "s-", label="median entry", color="tab:blue", markersize=4)
    panel.semilogy(layers, [max(100.0, 1000 * m) for m in medians], "--", color="gray", label="massive from here on")
    panel.set_xlabel("layer")
    panel.set_ylabel("magnitude of hidden states")
    panel.legend(frameon=False)
    panel.grid(alpha=0.3)
    figure.suptitle("Massive activations", x=0.01, ha="left")
    return _png(figure)


def bit_errors_figure(errors: Mapping[int, Mapping[str, Mapping[int, float]]], recipe: str) -> bytes:
    """Relative error of attention by layer, a line for each bit width; keys left, values right."""
    figure = _figure(12, 3.8)
    layers = list(errors)
    panels = figure.subplots(1, 2, sharey=True)
    for panel, side in zip(panels, ("key", "value")):
        for width in errors[layers[0]][side]:
            line = [max(errors[index][side][width], 1e-12) ** 0.5 for index in layers]
            panel.semilogy(layers, line, "o-", label=f"{width} bits", markersize=3.5)
        panel.axhline(1, color="gray", linestyle=":")
        panel.set_title(f"{NAMES[side]} alone ({recipe} at other widths)", loc="left", fontsize=10)
        panel.set_xlabel("layer")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("relative error")
    panels[1].legend(frameon=False, ncols=2)
    figure.suptitle("Predicted error of attention; at 1 (dotted) nothing is left of it", x=0.01, ha="left")
    return _png(figure)


def losses_figure(rows: Sequence[Mapping], good: float, collapse: float) -> bytes:
    """Predicted loss against bits, a point for each recipe."""
    figure = _figure(7.5, 4)
    panel = figure.subplots()
    colors = {"good": "tab:green", "lossy": "tab:orange", "collapse": "tab:red"}
    top = max([collapse * 4, *(row["loss"] for row in rows)])
    panel.axhspan(collapse, top * 2, color="tab:red", alpha=0.08)
    panel.axhline(good, color="tab:green", linestyle=":")
    labels: dict[tuple[float, float], list[str]] = {}
    for row in rows:
        size = max(row["loss"], 1e-5)
        panel.semilogy(row["bits_per_element"], size, "o", color=colors[row["verdict"]])
        # Recipes at nearly one place share a label.
        near = (p for p in labels if abs(p[0] - row["bits_per_element"]) < 0.2 and 0.7 < size / p[1] < 1.4)
        labels.setdefault(next(near, (row["bits_per_element"], size)), []).append(row["recipe"])
    for place, names in labels.items():
        panel.annotate(", ".join(names), place, xytext=(5, 3), textcoords="offset points", fontsize=9)
    panel.set_ylim(top=top * 2)
    panel.margins(x=0.15)
    panel.set_xlabel("bits per element")
    panel.set_ylabel("predicted loss, nats per token")
    panel.grid(alpha=0.3)
    figure.suptitle("Predicted loss (shaded: collapse; dotted: good below)", x=0.01, ha="left")
    return _png(figure)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _heat(panel, sizes: torch.Tensor, top: float):
    top = top or 1.0
    shown = sizes.clamp(min=top * _FLOOR).float().numpy()
    return panel.imshow(shown, aspect="auto", cmap=_MAP, norm=LogNorm(top * _FLOOR, top), interpolation="nearest")


def _mark_heads(panel, heads: int, width: int) -> None:
    for head in range(1, heads):
        panel.axvline(head * width / heads - 0.5, color="white", linewidth=0.8)


def _ticks(panel, layers: Sequence[int]) -> None:
    step = max(1, len(layers) // 15)
    panel.set_yticks(range(0, len(layers), step), [str(index) for index in layers[::step]])


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # Without the version of matplotlib in it, the same picture has the same bytes.
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()
