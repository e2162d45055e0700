"""Calls of the C++ kernels: which layouts they serve, and torch's tensors as they take them."""

from collections.abc import Sequence
from functools import lru_cache

import torch

from kvq.pages.layout import ATOM, PageLayout, SideLayout
from kvq.pages.pages import Pages

# ``kMostHeadDim`` of pages.h.
LARGEST_HEAD = 1024


@lru_cache(maxsize=256)
def why_no_layout(layout: PageLayout) -> str | None:
    """Why the kernels cannot read a layout, or None: they read code * scale + minimum, and e4m3 bytes."""
    for name in ("key", "value"):
        side = layout.side(name)
        if side.head_dim > LARGEST_HEAD:
            return f"head_dim {side.head_dim}, more than {LARGEST_HEAD}"
        if not side.is_plain or (side.axis == "token" and side.format == "affine" and side.group % ATOM):
            return f"the C++ kernels read plain codes only, not those of {name}s"
    return None


@lru_cache(maxsize=256)
def _side_numbers(layout: PageLayout, name: str) -> tuple[int, ...]:
    """``kvq::Side``."""
    side = layout.side(name)
    words, meta = layout.offsets[f"{name}_words"], layout.offsets.get(f"{name}_meta", 0)
    if side.format == "e4m3":
        return words, meta, 0, 0, side.head_dim, side.page_tokens, 1, side.head_dim, side.head_dim, side.page_tokens
    channel = int(side.axis == "channel")
    geometry = side.rows, side.chunks, side.width, side.head_dim, side.page_tokens
    return words, meta, side.bits, channel, side.group, *geometry


def decode_attention(
    q: torch.Tensor,
    pages: Pages,
    counts: torch.Tensor,
    exact: Sequence[torch.Tensor],
    sinks: Sequence[torch.Tensor] | None = None,
    *,
    softcap: float | None = None,
    window: int | None = None,
    learned: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a few query tokens, scaled already, over sinks | pages | exact tokens of every sequence.

    q        [B, K, G, L, D] float32 or float64: G query heads of each of K KV heads, L query tokens.
    pages    of a layout that ``why_no_layout`` has nothing against.
    counts   int32 [B, 7]: body tokens whose keys and whose values are read from pages, all body tokens, sinks, the
             position of the first query token, and the offsets of exact keys and values.
    exact    keys and values [B, K, n, D] of any dtype: body token t is at ``(t + offset) % n``.
    sinks    exact keys and values [B, K, S, D] before the body, or None.
    window   a query sees itself and the ``window - 1`` tokens before it.
    learned  one more logit a query head, [K, G]. bias: additive mask over sinks and body, [B, tokens].

    Returns (out like q, log-sum-exp [B, K, G, L]); a query that sees nothing gets 0 and minus infinity.
    """
    out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:4])
    layout = pages.layout
    numbers = (layout.page_tokens, layout.record_bytes, pages.pool.unit, window or 0)
    torch.ops.kvq.decode_attention(
        q.contiguous(),
        pages.pool.base,
        pages.table.long().contiguous(),
        [*numbers, *_side_numbers(layout, "key"), *_side_numbers(layout, "value")],
        counts,
        *(_rows(x) for x in exact),
        *((None, None) if sinks is None else (_rows(x) for x in sinks)),
        pages.key_scale,
        pages.value_scale,
        softcap or 0.0,
        None if learned is None else learned.to(q.dtype).contiguous(),
        None if bias is None else bias.to(q.dtype).contiguous(),
        out,
        lse,
    )
    return out, lse


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x with the numbers of a token side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


@lru_cache(maxsize=256)
def packs(side: SideLayout) -> bool:
    """Whether ``pack`` writes a side: fp16 pairs (scale, minimum) from a group's ends, or e4m3."""
    return side.is_plain and (side.axis == "channel" or side.format == "e4m3" or side.group % ATOM == 0)


def pack(x: torch.Tensor, pages: Pages, side: str, start: int) -> bool:
    """Quantize tokens x [B, K, t, D] of any dtype and write them from body token ``start``; axis channel: whole groups.

    Tokens before ``start`` keep their codes, those that share words with the last one written and follow it lose them.
    Returns False, with nothing of a group written, if numbers are NaN, infinite or too large for the metadata.
    """
    ranges = torch.tensor([[start, start + x.shape[2], -start]], dtype=torch.int32).expand(x.shape[0], 3).contiguous()
    layout = pages.layout
    pages.pool.forget_limit()
    return torch.ops.kvq.pack(
        _rows(x),
        ranges,
        pages.pool.base,
        pages.table.long().contiguous(),
        [layout.record_bytes, pages.pool.unit, *_side_numbers(layout, side)],
        pages.key_scale if side == "key" else pages.value_scale,
    )
