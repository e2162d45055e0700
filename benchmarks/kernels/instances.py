"""Kernel instances to compile without a GPU: the launches that decoding makes, on tensors that hold nothing."""

from types import SimpleNamespace

import torch

from kvq.bench.samples import codec_of, layout_of, levels_of
from kvq.kernels import dispatch
from kvq.kernels.append.advance import advance_launch
from kvq.kernels.append.decode_state import DecodeState, ExactStore
from kvq.kernels.append.launch import append
from kvq.kernels.decode_attention.decode_plan import geometry_of
from kvq.kernels.decode_attention.launch import exact, merge, split
from kvq.kernels.decode_attention.plan_items import plan_launch
from kvq.kernels.pack.launch import pack
from kvq.kernels.types import Exact, KeyFrame, Query, Source
from kvq.kernels.unpack.launch import unpack
from kvq.pages.flush import FlushRule
from kvq.pages.pages import Pages
from kvq.pages.pool import Pool

HEADS = 8
# Keys and values that are packed, by short names: every way to choose numbers, bits of 0, and numbers that heads share.
PACKED = [
    ("4", "4x"),
    ("2c32", "2/32"),
    ("3f", "e4m3"),
    ("4.2.0.2c128rx", "2zx"),
    ("2c16r", "even2l"),
    ("2c32n", "8st"),
    ("nf4", "book3l"),
    ("mx4", "nv4"),
]


def decode_launches(
    key: str,
    value: str,
    *,
    sm: int,
    group: int = 8,
    queries: int = 1,
    head_dim: int = 128,
    page_tokens: int = 64,
    frame: int = 0,
    **settings,
):
    """(geometry, {"split", "exact", "merge"}) of one decode step. ``frame``: tokens of a block that keys are relative
    to. ``settings``: softcap, window."""
    layout = layout_of(key, value, head_dim, page_tokens)
    geometry = geometry_of(layout, HEADS, group, queries, sm, frame)
    batch, capacity = 2, 4
    numbers = torch.zeros(batch, dtype=torch.int32)
    partial = torch.zeros(capacity + batch, HEADS, group * queries, head_dim)
    turned = geometry.column_blocks * HEADS * (capacity + batch), geometry.turned_blocks, geometry.turned_columns
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
        turned=torch.zeros(*turned, head_dim, dtype=torch.float16),
        turned_bias=torch.zeros(turned),
    )
    keys = None if not frame else _key_frame(frame, batch, head_dim)
    pages = _pages(layout, batch)
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
        "split": split(plan, pages, numbers, query, 0, keys),
        "exact": exact(plan, pages, query, tokens, keys),
        "merge": merge(plan, query, q.clone(), True),
    }


def other_launches(sm: int):
    """(name, launch) of every other kernel: what packs, moves and plans, and decoding of plain fp16 pages."""
    # Launches ask the device for its capability; here it is the target's.
    dispatch.capability = lambda device: sm
    layout = layout_of("4", "4")
    batch, head_dim = 2, 128
    x = torch.zeros(batch, HEADS, 64, head_dim, dtype=torch.bfloat16)
    numbers = torch.zeros(batch, dtype=torch.int32)
    source = Source(x=x, ranges=torch.zeros(batch, 2, dtype=torch.int32), offsets=numbers, longest=64)
    for key, value in PACKED:
        for side, width in (("key", key), ("value", value)):
            made = _pages(layout_of(key, value, page_tokens=128), batch)
            yield f"pack {side} {width}", pack(source, made, side, codec_of(width, head_dim).view(128))
    tiers = layout_of("4.2.0.2c64r", "8st")
    for made in (layout, layout_of("nf4", "e4m3"), tiers, layout_of("2c32n", "2z")):
        for side in ("key", "value"):
            yield (
                f"unpack {side} {made.side(side).format} {made.side(side).bits}",
                unpack(_pages(made, batch), side, numbers, x),
            )
    rules = {"key": FlushRule(window=32, unit=32), "value": FlushRule(window=32)}
    state = DecodeState(batch=batch, sinks=4, **rules, impl="reference")
    yield "advance", advance_launch(vars(state), 1, state.sinks, state.key, state.value)
    store = ExactStore.empty(state, heads=HEADS, head_dim=head_dim, dtype=torch.bfloat16)
    token = x[:, :, :1]
    for key, value in PACKED:
        made = _pages(layout_of(key, value, page_tokens=128), batch)
        views = {"key": codec_of(key, head_dim).view(128), "value": codec_of(value, head_dim).view(128)}
        yield f"append {key} {value}", append(token, token, store, made, state, views)
    geometry, decode = decode_launches("dense", "dense", sm=sm)
    yield "decode dense", decode["split"]
    geometry, decode = decode_launches("4", "4", sm=sm)
    yield "decode exact", decode["exact"]
    yield "decode merge", decode["merge"]
    yield "decode frame", decode_launches("4s", "4s", sm=sm, group=4, head_dim=64, frame=64)[1]["split"]
    items, spans = torch.zeros(4, 4, dtype=torch.int32), torch.zeros(batch, 2, dtype=torch.int32)
    settings = {"slots": 8, "programs": HEADS, "tile": geometry.tile, "queries": 1, "window": None, "first_token": 0}
    yield "plan", plan_launch(numbers, None, items, spans, **settings)


def _key_frame(block: int, batch: int, head_dim: int) -> KeyFrame:
    """With a matrix and a mean, as klt's."""
    return KeyFrame(
        block=block,
        index=torch.zeros(batch, 16, dtype=torch.int32),
        turns=torch.zeros(16, 2, head_dim),
        partner=torch.zeros(head_dim, dtype=torch.int32),
        matrix=torch.zeros(HEADS, head_dim, head_dim, dtype=torch.float16),
        mean=torch.zeros(HEADS, head_dim),
    )


def _pages(layout, batch: int) -> Pages:
    return Pages(
        pool=Pool.borrow(torch.zeros(2, layout.page_bytes(HEADS), dtype=torch.uint8), layout, HEADS),
        numbers=torch.zeros(batch, 16, dtype=torch.int32),
        key_levels=levels_of(layout.key),
        value_levels=levels_of(layout.value),
    )
