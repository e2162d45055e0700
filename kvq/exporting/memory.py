"""What a recipe's cache will weigh on a model, from the config alone: the table of a dry run and of the model card."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from kvq.cache import CachePlan, make_plan
from kvq.cache.plan import check_transforms
from kvq.calib.artefacts import stand_in_artefacts
from kvq.models.describe import ModelSpec
from kvq.recipe import Recipe

LENGTHS = (4_096, 32_768, 131_072)


@dataclass(frozen=True, kw_only=True)
class MemoryRow:
    """Cache bytes of one sequence of ``tokens`` tokens: a plain 16-bit cache, and the recipe's."""

    tokens: int
    plain_bytes: int
    recipe_bytes: int
    ratio: float


@dataclass(frozen=True, kw_only=True)
class LayerKindRow:
    """Layers stored alike.

    kind     ``packed``, ``exact`` (full attention that the recipe keeps exact), ``sliding`` (a bounded window, exact)
             or ``none`` (no cache of its own).
    layers   how many.
    bytes_per_token   growth over these layers with the recipe, bytes; 0 where the cache is bounded.
    """

    kind: str
    layers: int
    bytes_per_token: float


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Predicted cache memory of one sequence, exact numbers at 2 bytes.

    plain_bytes_per_token, bytes_per_token   asymptotic growth, bytes per token over all layers.
    bits_per_element                         asymptotic, over the full-attention layers, metadata included.
    """

    recipe: str
    model_type: str
    bits_per_element: float
    plain_bytes_per_token: int
    bytes_per_token: float
    lengths: tuple[MemoryRow, ...]
    layer_kinds: tuple[LayerKindRow, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def memory_plan(spec: ModelSpec, recipe: Recipe) -> MemoryPlan:
    """Predict cache bytes of ``recipe`` on ``spec``; needs no weights and no statistics, since no byte depends on them.

    Raises RecipeError or UnsupportedModelError as ``make_plan`` and ``check_transforms`` do.
    """
    check_transforms(recipe, spec)
    model = replace(spec, dtype=torch.float16)
    plan = make_plan(recipe, model, stand_in_artefacts(recipe, model))
    plain = CachePlan(recipe=recipe, model=model, layers={})
    lengths = []
    for tokens in LENGTHS:
        before, after = plain.predicted_bytes(tokens), plan.predicted_bytes(tokens)
        lengths.append(MemoryRow(tokens=tokens, plain_bytes=before, recipe_bytes=after, ratio=before / after))
    kinds = _layer_kinds(plan)
    return MemoryPlan(
        recipe=recipe.name,
        model_type=spec.model_type,
        bits_per_element=plan.bits_per_element,
        plain_bytes_per_token=plain.elements(1) * model.dtype.itemsize,
        bytes_per_token=sum(row.bytes_per_token for row in kinds),
        lengths=tuple(lengths),
        layer_kinds=kinds,
    )


def _layer_kinds(plan: CachePlan) -> tuple[LayerKindRow, ...]:
    counts = dict.fromkeys(("packed", "exact", "sliding", "none"), 0)
    growth = dict.fromkeys(counts, 0.0)
    for layer in plan.model.layers:
        if layer.index in plan.layers:
            kind = "packed"
            bits = sum(len(g.heads) * g.bits_per_element for g in plan.layers[layer.index]) * 2 * layer.head_dim
            growth[kind] += bits / 8
        elif layer.kind == "full":
            kind = "exact"
            growth[kind] += 2 * layer.kv_heads * layer.head_dim * plan.model.dtype.itemsize
        else:
            kind = "sliding" if layer.kind == "sliding" else "none"
        counts[kind] += 1
    return tuple(LayerKindRow(kind=k, layers=n, bytes_per_token=growth[k]) for k, n in counts.items() if n)
