"""The pictures of a diagnosis, by file name: what was measured, and what a recipe's transforms make of it."""

from collections.abc import Mapping, Sequence

import torch

from kvq.cache.plan import CachePlan
from kvq.calib.stats import Stats
from kvq.diagnosis import Diagnosis, LayerTokens
from kvq.diagnosis.predict import COLLAPSE, GOOD
from kvq.pages.layout import SIDES
from kvq.report import figures

BEFORE = "as the model makes them"


def pictures(
    stats: Stats,
    layers: Mapping[int, LayerTokens],
    diagnosis: Diagnosis,
    bit_errors: Mapping,
    bit_recipe: str,
    plan: CachePlan | None,
) -> dict[str, bytes]:
    """PNG files by name.

    plan   of the recipe whose transforms are shown; None: only what the model makes.
    """
    found = {}
    tried = [row for row in diagnosis.to_dict()["predictions"] if not row["why_not"]]
    if tried:
        found["losses.png"] = figures.losses_figure(tried, GOOD, COLLAPSE)
    found["bits.png"] = figures.bit_errors_figure(bit_errors, bit_recipe)
    for side in SIDES:
        found |= _channels(layers, side, plan)
    for index in _chosen(layers, diagnosis):
        found[f"tokens-{index:03}.png"] = figures.tokens_figure(
            _tokens(layers[index], index, plan), index, layers[index].is_real
        )
    return found | _sinks(stats) | _massive(stats)


def _channels(layers: Mapping[int, LayerTokens], side: str, plan: CachePlan | None) -> dict[str, bytes]:
    """A picture for every shape of layers; nearly all models have one."""
    shapes: dict[tuple[int, int], list[int]] = {}
    for index, tokens in layers.items():
        x = getattr(tokens, side)
        shapes.setdefault((x.shape[1], x.shape[3]), []).append(index)
    found = {}
    for (heads, channels), indices in shapes.items():
        parts = {BEFORE: _peaks(getattr(layers[i], side) for i in indices)}
        if plan is not None:
            parts[f"as {plan.recipe.name} stores them"] = _peaks(
                _written(plan, i, side, getattr(layers[i], side)) for i in indices
            )
        name = f"channels-{side}.png" if len(shapes) == 1 else f"channels-{side}-{heads}x{channels}.png"
        found[name] = figures.channels_figure(parts, side, indices, heads)
    return found


def _peaks(parts) -> torch.Tensor:
    """[L, K * D] of tokens [W, K, T, D] of each layer."""
    return torch.stack([x.abs().amax((0, 2)).flatten() for x in parts])


def _tokens(tokens: LayerTokens, index: int, plan: CachePlan | None) -> dict[str, torch.Tensor]:
    parts = {}
    for side in SIDES:
        x = getattr(tokens, side)[:1]
        parts[f"{figures.NAMES[side]} {BEFORE}"] = _rows(x)
        if plan is not None:
            parts[f"{figures.NAMES[side]} as {plan.recipe.name} stores them"] = _rows(_written(plan, index, side, x))
    return parts


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[T, K * D] of the first window of x [W, K, T, D]."""
    return x[0].transpose(0, 1).flatten(1)


def _written(plan: CachePlan, index: int, side: str, x: torch.Tensor) -> torch.Tensor:
    """x after the transforms of a recipe; as it is in layers that stay exact."""
    chain = plan.chains.get(index, {}).get(side)
    return x if chain is None else chain.whole.write(x)


def _chosen(layers: Mapping[int, LayerTokens], diagnosis: Diagnosis) -> list[int]:
    """The first layer, the last one, and the one that the worst recipe hurts most."""
    tried = [p for p in diagnosis.predictions if not p.why_not]
    worst = max(tried, key=lambda p: p.loss).worst_layer if tried else min(layers)
    return sorted({min(layers), worst, max(layers)})


def _sinks(stats: Stats) -> dict[str, bytes]:
    held = [i for i, layer in stats.layers.items() if "sinks" in layer]
    if not held:
        return {}
    share = torch.stack([stats.layers[i]["sinks"].share.mean(0) for i in held])
    return {"sinks.png": figures.sinks_figure(share, held)}


def _massive(stats: Stats) -> dict[str, bytes]:
    held: Sequence[int] = [i for i, layer in stats.layers.items() if "massive" in layer]
    if not held:
        return {}
    parts = [stats.layers[i]["massive"] for i in held]
    return {"massive.png": figures.massive_figure([p.peak for p in parts], [p.median for p in parts], held)}
