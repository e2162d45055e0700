"""The pictures of a diagnosis, by name: what calibration measured, and what a recipe's transforms make of it."""

from collections.abc import Mapping, Sequence

import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from kvq.cache.plan import CachePlan
from kvq.calib.stats import Stats
from kvq.diagnosis import Diagnosis, LayerTokens
from kvq.diagnosis.predict import COLLAPSE, GOOD
from kvq.pages.layout import SIDES
from kvq.report.drawing import COLOURS, new_figure, styled
from kvq.transforms.frame import block_origins

_BEFORE = "as the model makes them"
_NAMES = {"key": "keys", "value": "values"}
_VERDICTS = {"good": COLOURS["good"], "lossy": COLOURS["fair"], "collapse": COLOURS["bad"]}
_MAP = "viridis"
# Magnitudes below this share of the largest are drawn like it.
_FLOOR = 1e-2


def diagnosis_charts(
    stats: Stats,
    layers: Mapping[int, LayerTokens],
    diagnosis: Diagnosis,
    bit_errors: Mapping,
    bit_recipe: str,
    plan: CachePlan | None,
) -> dict[str, Figure]:
    """Figures by name.

    plan   of the recipe whose transforms are shown; None: only what the model makes.
    """
    found = {}
    tried = [row for row in diagnosis.to_dict()["predictions"] if not row["why_not"]]
    if tried:
        found["losses"] = losses_figure(tried, GOOD, COLLAPSE)
    found["bits"] = _bit_errors(bit_errors, bit_recipe)
    for side in SIDES:
        found |= _channels(layers, side, plan)
    for index in _chosen(layers, diagnosis):
        found[f"tokens-{index:03}"] = _tokens(layers[index], index, plan)
    return found | _sinks(stats) | _massive(stats)


@styled
def losses_figure(rows: Sequence[Mapping], good: float, collapse: float) -> Figure:
    """Predicted loss against bits, a point for each recipe."""
    figure, axes = _panel("Predicted loss (shaded: collapse; dotted: good below)", 540, 288)
    top = max([collapse * 4, *(row["loss"] for row in rows)])
    axes.axhspan(collapse, top * 2, color=COLOURS["bad"], alpha=0.08)
    axes.axhline(good, color=COLOURS["good"], linestyle=":")
    labels: dict[tuple[float, float], list[str]] = {}
    for row in rows:
        size = max(row["loss"], 1e-5)
        axes.semilogy(row["bits_per_element"], size, "o", color=_VERDICTS[row["verdict"]])
        # Recipes at nearly one place share a label.
        near = (p for p in labels if abs(p[0] - row["bits_per_element"]) < 0.2 and 0.7 < size / p[1] < 1.4)
        labels.setdefault(next(near, (row["bits_per_element"], size)), []).append(row["recipe"])
    for place, names in labels.items():
        axes.annotate(", ".join(names), place, xytext=(5, 3), textcoords="offset points", fontsize=9)
    axes.set(ylim=(None, top * 2), xlabel="bits per element", ylabel="predicted loss, nats per token")
    axes.margins(x=0.15)
    axes.grid()
    return figure


@styled
def _bit_errors(errors: Mapping[int, Mapping[str, Mapping[int, float]]], recipe: str) -> Figure:
    """Relative error of attention by layer, a line for each bit width; keys left, values right."""
    figure = new_figure(864, 274)
    layers = list(errors)
    panels = figure.subplots(1, 2, sharey=True)
    for panel, side in zip(panels, SIDES):
        for width in errors[layers[0]][side]:
            line = [max(errors[index][side][width], 1e-12) ** 0.5 for index in layers]
            panel.semilogy(layers, line, "o-", label=f"{width} bits", markersize=3.5)
        panel.axhline(1, color=COLOURS["soft"], linestyle=":")
        panel.set(title=f"{_NAMES[side]} alone ({recipe} at other widths)", xlabel="layer")
        panel.grid()
    panels[0].set_ylabel("relative error")
    panels[1].legend(ncols=2)
    figure.suptitle("Predicted error of attention; at 1 (dotted) nothing is left of it", x=0.01, ha="left")
    return figure


def _channels(layers: Mapping[int, LayerTokens], side: str, plan: CachePlan | None) -> dict[str, Figure]:
    """A figure for every shape of layers; nearly all models have one."""
    shapes: dict[tuple[int, int], list[int]] = {}
    for index, tokens in layers.items():
        x = getattr(tokens, side)
        shapes.setdefault((x.shape[1], x.shape[3]), []).append(index)
    found = {}
    for (heads, channels), indices in shapes.items():
        parts = {_BEFORE: _peaks(getattr(layers[i], side) for i in indices)}
        if plan is not None:
            parts[f"as {plan.recipe.name} stores them"] = _peaks(
                _written(plan, i, side, getattr(layers[i], side)) for i in indices
            )
        name = f"channels-{side}" if len(shapes) == 1 else f"channels-{side}-{heads}x{channels}"
        found[name] = _channels_figure(parts, side, indices, heads)
    return found


@styled
def _channels_figure(magnitudes: Mapping[str, torch.Tensor], side: str, layers: Sequence[int], heads: int) -> Figure:
    """Largest magnitude of every channel (across) in every layer (down), a panel for each title: [L, heads * D]."""
    figure = new_figure(446 * len(magnitudes) + 58, 137 + 9.4 * len(layers))
    panels = figure.subplots(1, len(magnitudes), squeeze=False)[0]
    # One scale for all panels, so that they compare.
    top = max(float(sizes.max()) for sizes in magnitudes.values())
    for panel, (title, sizes) in zip(panels, magnitudes.items()):
        _heat(panel, sizes, top)
        panel.set(title=title, xlabel=f"channel ({heads} head{'s' if heads > 1 else ''} side by side)")
        for head in range(1, heads):
            panel.axvline(head * sizes.shape[1] / heads - 0.5, color="white", linewidth=0.8)
        _layer_ticks(panel, layers)
    panels[0].set_ylabel("layer")
    figure.suptitle(f"Largest magnitudes of {_NAMES[side]} by channel and layer", x=0.01, ha="left")
    return figure


@styled
def _tokens(tokens: LayerTokens, index: int, plan: CachePlan | None) -> Figure:
    """|x| by token (down) and channel (across) of a layer's first window, before and after a recipe's transforms."""
    parts = {}
    for side in SIDES:
        x = getattr(tokens, side)[:1]
        parts[f"{_NAMES[side]} {_BEFORE}"] = _rows(x)
        if plan is not None:
            parts[f"{_NAMES[side]} as {plan.recipe.name} stores them"] = _rows(_written(plan, index, side, x))
    figure = new_figure(950, 43 + 238 * (len(parts) // 2))
    for panel, (title, x) in zip(figure.subplots(len(parts) // 2, 2, squeeze=False).flatten(), parts.items()):
        _heat(panel, x.abs(), float(x.abs().max()))
        panel.set(title=title, xlabel="channel", ylabel="token")
    what = "tokens of the text" if tokens.is_real else "tokens drawn by the measured distributions"
    figure.suptitle(f"Layer {index}: magnitudes by token and channel ({what})", x=0.01, ha="left")
    return figure


@styled
def _sinks(stats: Stats) -> dict[str, Figure]:
    """Share of attention that each of the first positions gets in each layer, mean over heads."""
    held = [i for i, layer in stats.layers.items() if "sinks" in layer]
    if not held:
        return {}
    share = torch.stack([stats.layers[i]["sinks"].share.mean(0) for i in held])
    figure, axes = _panel("Attention sinks", 468, 137 + 9.4 * len(held))
    image = axes.imshow(share.numpy(), aspect="auto", cmap=_MAP, vmin=0, vmax=1, interpolation="nearest")
    axes.set(xlabel="position in the text", ylabel="layer", xticks=range(share.shape[1]))
    _layer_ticks(axes, held)
    _scale(axes, image, label="share of attention")
    return {"sinks": figure}


@styled
def _massive(stats: Stats) -> dict[str, Figure]:
    """Largest and median magnitude of the hidden states that enter each layer."""
    held = [i for i, layer in stats.layers.items() if "massive" in layer]
    if not held:
        return {}
    peaks, medians = ([getattr(stats.layers[i]["massive"], name) for i in held] for name in ("peak", "median"))
    figure, axes = _panel("Massive activations", 468, 245)
    axes.semilogy(held, peaks, "o-", label="largest entry", color=COLOURS["bad"], markersize=4)
    axes.semilogy(held, medians, "s-", label="median entry", color=COLOURS["accent"], markersize=4)
    from_here = [max(100.0, 1000 * median) for median in medians]
    axes.semilogy(held, from_here, "--", color=COLOURS["soft"], label="massive from here on")
    axes.set(xlabel="layer", ylabel="magnitude of hidden states")
    axes.legend()
    axes.grid()
    return {"massive": figure}


def _peaks(parts) -> torch.Tensor:
    """[L, K * D] of tokens [W, K, T, D] of each layer."""
    return torch.stack([x.abs().amax((0, 2)).flatten() for x in parts])


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[T, K * D] of the first window of x [W, K, T, D]."""
    return x[0].transpose(0, 1).flatten(1)


def _written(plan: CachePlan, index: int, side: str, x: torch.Tensor) -> torch.Tensor:
    """x after the transforms of a recipe; as it is in layers that stay exact."""
    chain = plan.chains.get(index, {}).get(side)
    if chain is None:
        return x
    x = chain.whole.forward(x)
    if not plan.framed[index][side]:
        return x
    parts, heads = [], []
    for group in plan.layers[index]:
        frame = group.frame if side == "key" else group.value_frame
        origins = block_origins(torch.arange(x.shape[2])[None], frame.block)
        parts.append(frame.enter(x[:, list(group.heads)], origins).to(x))
        heads += group.heads
    return torch.cat(parts, dim=1)[:, torch.tensor(heads).argsort()]


def _chosen(layers: Mapping[int, LayerTokens], diagnosis: Diagnosis) -> list[int]:
    """The first layer, the last one, and the one that the worst recipe hurts most."""
    tried = [p for p in diagnosis.predictions if not p.why_not]
    worst = max(tried, key=lambda p: p.loss).worst_layer if tried else min(layers)
    return sorted({min(layers), worst, max(layers)})


def _panel(title: str, width: float, height: float):
    figure = new_figure(width, height)
    figure.suptitle(title, x=0.01, ha="left")
    return figure, figure.subplots()


def _heat(panel, sizes: torch.Tensor, top: float) -> None:
    top = top or 1.0
    shown = sizes.clamp(min=top * _FLOOR).float().numpy()
    norm = LogNorm(top * _FLOOR, top)
    _scale(panel, panel.imshow(shown, aspect="auto", cmap=_MAP, norm=norm, interpolation="nearest"))


def _scale(panel, image, label: str = "") -> None:
    bar = panel.figure.colorbar(image, ax=panel, pad=0.02, label=label)
    # Else every shade is a path of its own in SVG.
    bar.solids.set_rasterized(True)


def _layer_ticks(panel, layers: Sequence[int]) -> None:
    step = max(1, len(layers) // 15)
    panel.set_yticks(range(0, len(layers), step), [str(index) for index in layers[::step]])
