"""Calls of the C++ kernels: torch's tensors as they take them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from kvq.kernels.cpp.sides import CppSide
from kvq.pages.pages import Pages


@dataclass(frozen=True, kw_only=True)
class FrameNumbers:
    """Keys in pages stand relative to their block (``kvq.transforms.frame``).

    block       tokens of a block, which pages hold whole; turns_keys: keys leave the frame, and no query enters it.
    cos, sin    [B, blocks, D], by origin; partner [D] int64: the other channel of a rotary pair.
    matrix      [K, D, D], transposed where keys are turned, or None; mean [K, D] or None.
    """

    block: int
    turns_keys: bool
    cos: torch.Tensor
    sin: torch.Tensor
    partner: torch.Tensor
    matrix: torch.Tensor | None
    mean: torch.Tensor | None


def decode_attention(
    q: torch.Tensor,
    pages: Pages,
    sides: Mapping[str, CppSide],
    counts: torch.Tensor,
    exact: Sequence[torch.Tensor],
    sinks: Sequence[torch.Tensor] | None = None,
    *,
    frame: FrameNumbers | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sink_logits: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a few query tokens, scaled already, over sinks | pages | exact tokens of every sequence.

    q        [B, K, G, L, D] float32 or float64: G query heads of each of K KV heads, L query tokens.
    pages, sides   where the packed tokens lie, and what they are (``sides.sides_of``).
    counts   int32 [B, 7]: body tokens whose keys and whose values are read from pages, all body tokens, sinks, the
             position of the first query token, and the offsets of exact keys and values.
    exact    keys and values [B, K, n, D] of any dtype: body token t is at ``(t + offset) % n``.
    sinks    exact keys and values [B, K, S, D] before the body, or None.
    frame    where packed keys stand, None: where exact ones do.
    window   a query sees itself and the ``window - 1`` tokens before it.
    sink_logits  one more logit a query head, [K, G]. bias: additive mask over sinks and body, [B, tokens].

    Returns (out like q, log-sum-exp [B, K, G, L]); a query that sees nothing gets 0 and minus infinity.
    """
    out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:4])
    layout = pages.layout
    numbers = (layout.page_tokens, layout.record_bytes, pages.pool.unit, window or 0)
    numbers += (frame.block, int(frame.turns_keys)) if frame else (0, 0)
    turns = (frame.cos, frame.sin, frame.partner, frame.matrix, frame.mean) if frame else (None,) * 5
    torch.ops.kvq.decode_attention(
        q.contiguous(),
        pages.pool.base,
        pages.table.long().contiguous(),
        numbers,
        sides["key"].numbers,
        sides["key"].reals,
        sides["value"].numbers,
        sides["value"].reals,
        counts,
        *(_rows(x) for x in exact),
        *((None, None) if sinks is None else (_rows(x) for x in sinks)),
        *turns,
        softcap or 0.0,
        None if sink_logits is None else sink_logits.to(q.dtype).contiguous(),
        None if bias is None else bias.to(q.dtype).contiguous(),
        out,
        lse,
    )
    return out, lse


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x with the numbers of a token side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


@lru_cache(maxsize=8)
def _ranges(rows: int, start: int, stop: int) -> torch.Tensor:
    """int32 [rows, 3] as ``kvq::Pack`` takes it; the layers of a forward share it."""
    # Not of whoever is in inference mode first.
    with torch.inference_mode(False):
        return torch.tensor([[start, stop, -start]] * rows, dtype=torch.int32)


def pack(x: torch.Tensor, pages: Pages, side: CppSide, start: int) -> bool:
    """Quantize tokens x [B, K, t, D] of any dtype and write them from body token ``start``; axis channel: whole groups.

    ``side`` is one that the kernel packs.

    Tokens before ``start`` keep their codes, those that share words with the last one written and follow it lose them.
    Returns False, with nothing of a group written, if numbers are NaN, infinite or too large for the metadata.
    """
    ranges = _ranges(x.shape[0], start, start + x.shape[2])
    pages.pool.forget_limit()
    return torch.ops.kvq.pack(
        _rows(x),
        ranges,
        pages.pool.base,
        pages.table.long().contiguous(),
        side.numbers,
        side.reals,
        pages.layout.record_bytes,
        pages.pool.unit,
    )
