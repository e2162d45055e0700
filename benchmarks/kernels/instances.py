"""Kernel instances to compile without a GPU: the launches that decoding makes, on tensors that hold nothing."""

from types import SimpleNamespace

import torch

from kvq.kernels.attention import Exact, Query
from kvq.kernels.device import launch
from kvq.kernels.pages import Pages
from kvq.kernels.plan import geometry_of
from kvq.kernels.spec import PageLayout, Section, SideLayout

HEADS = 8


def side_of(width: str, head_dim: int, page_tokens: int) -> SideLayout:
    """A side by a short name.

    4       4-bit codes, a scale and a minimum a token          4c32    per channel, groups of 32 tokens
    4/32    the same for groups of 32 channels                  4s      a scale and no minimum
    e4m3    fp8                                                 book4   levels of a book times a norm a token
    nf4     levels of a book times a scale a token              mx4     levels times a power of two for 32 channels
    """
    common = {"head_dim": head_dim, "page_tokens": page_tokens}
    if width == "e4m3":
        return SideLayout(format="e4m3", bits=8, **common)
    if width.startswith("book"):
        norm = Section(name="norm", shape=())
        return SideLayout(format="book", bits=int(width[4:]), meta_terms=0, extras=(norm,), **common)
    if width == "nf4":
        return SideLayout(format="book", bits=4, meta_terms=1, group=head_dim, **common)
    if width == "mx4":
        return SideLayout(format="book", bits=4, meta_terms=1, meta_format="e8m0", group=32, **common)
    terms = 1 if width.endswith("s") else 2
    axis = "channel" if "c" in width else "token"
    bits, _, group = width.rstrip("s").replace("c", "/").partition("/")
    return SideLayout(
        format="affine", bits=int(bits), axis=axis, group=int(group or head_dim), meta_terms=terms, **common
    )


def _levels(side: SideLayout) -> tuple[float, ...] | None:
    return tuple(i - 2 ** (side.bits - 1) + 0.5 for i in range(2**side.bits)) if side.format == "book" else None


def layout_of(key: str, value: str, head_dim: int = 128, page_tokens: int = 64) -> PageLayout:
    return PageLayout(key=side_of(key, head_dim, page_tokens), value=side_of(value, head_dim, page_tokens))


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
        key_levels=_levels(layout.key),
        value_levels=_levels(layout.value),
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
