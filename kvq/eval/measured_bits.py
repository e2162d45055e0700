"""Bits per element, measured: fill a real cache and count its bytes."""

import torch
from transformers.cache_utils import DynamicLayer

from kvq.cache import CachePlan, HeadGroup, PackedLayer
from kvq.cache.context import ForwardContext
from kvq.models.describe import LayerSpec


def measured_bits(plan: CachePlan, tokens: int, dtype: torch.dtype | None = None) -> float:
    """Bits per number of the full-attention layers' cache of one sequence of ``tokens`` tokens.

    Random keys and values of the model's shapes go through real layers: packed ones, and plain ones where the plan
    leaves a layer exact. Everything a layer holds counts: codes, metadata, sinks, exact window and its spare room,
    unused pages. Layers of one geometry hold equal bytes, so one of each is filled.

    dtype   of keys, values and exact tokens; None: the checkpoint's.
    """
    dtype = dtype or plan.model.dtype
    sizes: dict[tuple, int] = {}
    total = 0
    for layer in plan.model.full_layers:
        groups = plan.layers.get(layer.index, ())
        geometry = (layer.kv_heads, layer.head_dim, tuple(_geometry(group) for group in groups))
        if geometry not in sizes:
            sizes[geometry] = _filled_bytes(layer, groups, tokens, dtype)
        total += sizes[geometry]
    return 8 * total / plan.elements(tokens)


def _geometry(group: HeadGroup) -> tuple:
    """What decides a group's bytes; the static scales of its codecs do not."""
    return group.heads, group.sinks, tuple(group.rules.values()), group.layout


def _filled_bytes(layer: LayerSpec, groups: tuple[HeadGroup, ...], tokens: int, dtype: torch.dtype) -> int:
    generator = torch.Generator().manual_seed(0)
    shape = (1, layer.kv_heads, tokens, layer.head_dim)
    keys, values = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    if groups:
        packed = PackedLayer(groups, ForwardContext())
        packed.update(keys, values)
        return packed.nbytes
    plain = DynamicLayer()
    plain.update(keys, values)
    return plain.keys.nbytes + plain.values.nbytes
