"""Kernel instances to compile without a GPU: the launches that decoding makes, on tensors that hold nothing."""

from types import SimpleNamespace

import torch

from kvq.kernels.attention import Exact, Query
from kvq.kernels.device import launch
from kvq.kernels.pages import Pages
from kvq.kernels.plan import geometry_of
from kvq.kernels.samples import layout_of, levels_of

HEADS = 8


def decode_launches(
    key: str,
    value: str,
    *,
    sm: int,
    group: int = 8,
    queries: int = 1,
    head_dim: int = 128,
    page_tokens: int = 64,
    **settings,
):
    """(geometry, {"split", "exact", "merge"}) of one decode step. ``settings``: softcap, window, causal."""
    layout = layout_of(key, value, head_dim, page_tokens)
    geometry = geometry_of(layout, HEADS, group, queries, sm)
    batch, capacity = 2, 4
    numbers = torch.zeros(batch, dtype=torch.int32)
    partial = torch.zeros(capacity + batch, HEADS, group * queries, head_dim)
    plan = SimpleNamespace(
        geometry=geometry,
        batch=batch,
        heads=HEADS,
        capacity=capacity,
        items=torch.zeros(capacity, 4, dtype=torch.int32),
        spans=torch.zeros(batch, 2, dtype=torch.int32),
        partial=partial,
        partial_lse=partial[..., 0].contiguous(),
        lse=partial[:batch, ..., 0].contiguous(),
    )
    pool = torch.zeros(2, HEADS, layout.record_bytes, dtype=torch.uint8)
    pages = Pages.of(
        layout,
        pool,
        torch.zeros(batch, 16, dtype=torch.int32),
        value_limit=torch.ones(HEADS),
        key_levels=levels_of(layout.key),
        value_levels=levels_of(layout.value),
    )
    q = torch.zeros(batch, HEADS * group, queries, head_dim, dtype=torch.bfloat16)
    query = Query(q=q, scale=head_dim**-0.5, positions=numbers, **settings)
    ring = torch.zeros(batch, HEADS, 160, head_dim, dtype=torch.bfloat16)
    tokens = Exact(
        lengths=torch.zeros(batch, 4, dtype=torch.int32),
        keys=ring,
        values=ring,
        key_offsets=numbers,
        value_offsets=numbers,
        sink_keys=ring[:, :, :4],
        sink_values=ring[:, :, :4],
        mixed_key=layout.key.axis == "channel",
    )
    return geometry, {
        "split": launch.split(plan, pages, numbers, query, 0),
        "exact": launch.exact(plan, pages, query, tokens),
        "merge": launch.merge(plan, query, q.clone(), True),
    }
