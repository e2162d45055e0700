"""Kernel instances to compile without a GPU: the launches that decoding makes, on tensors that hold nothing."""

from types import SimpleNamespace

import torch

from kvq.kernels.attention import Exact, Query
from kvq.kernels.device import launch
from kvq.kernels.pages import Pages
from kvq.kernels.plan import geometry_of
from kvq.kernels.spec import PageLayout, SideLayout

HEADS = 8


def side_of(width: str, head_dim: int, page_tokens: int) -> SideLayout:
    """``4``: 4 bits, one scale a token. ``4/32``: groups of 32 channels. ``4c32``: per channel, 32 tokens. ``e4m3``."""
    if width == "e4m3":
        return SideLayout(format="e4m3", bits=8, head_dim=head_dim, page_tokens=page_tokens)
    axis = "channel" if "c" in width else "token"
    bits, _, group = width.replace("c", "/").partition("/")
    return SideLayout(
        format="affine",
        bits=int(bits),
        head_dim=head_dim,
        page_tokens=page_tokens,
        axis=axis,
        group=int(group or head_dim),
    )


def layout_of(key: str, value: str, head_dim: int = 128, page_tokens: int = 64) -> PageLayout:
    return PageLayout(key=side_of(key, head_dim, page_tokens), value=side_of(value, head_dim, page_tokens))


def decode_launches(
    key: str, value: str, *, sm: int, group: int = 8, queries: int = 1, head_dim: int = 128, page_tokens: int = 64, **settings
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
    limit = torch.ones(HEADS) if layout.value.format == "affine" else None
    pages = Pages.of(layout, pool, torch.zeros(batch, 16, dtype=torch.int32), value_limit=limit)
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
