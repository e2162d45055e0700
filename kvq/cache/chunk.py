"""Attention of many queries at once where Triton runs: a second turn, a chunk of a prompt.

Packed pages are unpacked, ``SCRATCH_TOKENS`` at a time, to scratch in the queries' dtype, torch's flash attention reads
it, and the partial results merge by log-sum-exp. No score matrix is ever there, and memory does not grow with the past.
"""

import torch

from kvq.cache.fused_pack import pages_of
from kvq.cache.reading import decoded, unframed
from kvq.cache.snapshot import Snapshot, View, group_rows
from kvq.cache.store import HeadStore
from kvq.kernels.decode_attention.products import Partial
from kvq.kernels.unpack import unpack_pages
from kvq.pages.layout import SIDES

# Tokens of a row that are unpacked at once, a multiple of every page.
SCRATCH_TOKENS = 8192


def scratch_bytes(rows: int, heads: int, head_dim: int, group: int, length: int, itemsize: int = 2) -> int:
    """Most bytes that ``attend`` holds at a time for pages of ``rows`` sequences of any length.

    They are unpacked keys and values, and the partial results of ``length`` queries of ``group`` heads a KV head: two
    in float32 and one in the queries' dtype. What holds exact tokens is as large as they are, times ``group`` for the
    queries' own.
    """
    scratch = 2 * rows * heads * SCRATCH_TOKENS * head_dim * itemsize
    return scratch + rows * heads * group * length * (head_dim * (4 + 4 + itemsize) + 8)


def attend(store: HeadStore, snapshot: Snapshot, q: torch.Tensor, options, lse: torch.Tensor | None) -> torch.Tensor:
    """Causal attention of queries [B, kv_heads, group, L, head_dim], same shape out, without a softcap.

    lse [B, kv_heads, group, L] gets the log-sum-exp; None if nobody asks.
    """
    out = torch.empty_like(q)
    keys = list(zip(snapshot.before, snapshot.added, map(tuple, (map(_reads, views) for views in snapshot.views))))
    for rows in group_rows(keys):
        for view in snapshot.views[rows[0]]:
            at = (rows, slice(None), slice(None), slice(view.start, view.stop))
            found, own = _attend_rows(store, snapshot, rows, view, q[at], options)
            if options.sink_logits is not None:
                learned = options.sink_logits.float().view(1, *q.shape[1:3], 1).expand(own.shape)
                found, own = _merged((found, own), (torch.zeros_like(found), learned))
            out[at] = found.to(q.dtype)
            if lse is not None:
                lse[at] = own.to(lse.dtype)
    return out


def _reads(view: View) -> tuple[int, ...]:
    return view.start, view.stop, *(view.packed[side] for side in SIDES)


def _attend_rows(store, snapshot, rows: list[int], view: View, q: torch.Tensor, options) -> Partial:
    """Rows that read alike: (output [b, K, G, L, D] fp32, log-sum-exp [b, K, G, L]) over sinks, pages, exact tokens."""
    b, K, G, L, D = q.shape
    sinks, first = store.group.sinks, snapshot.before[rows[0]] + view.start
    total = snapshot.before[rows[0]] + snapshot.added[rows[0]]
    body = max(0, first - sinks)
    packed = {side: min(view.packed[side], body) for side in SIDES}
    low, high = min(packed.values()), max(packed.values())
    tokens = {}
    for side in SIDES:
        exact = snapshot.exact[side]
        exact = exact if len(rows) == len(exact) else exact[rows]
        offset = exact.shape[2] - max(0, total - sinks)
        parts = [store.sinks[side][rows][:, :, : min(first + L, sinks)]] if side in store.sinks else []
        if high > low and packed[side] == high:
            parts.append(unpacked(store, side, rows, low, high, q.dtype))
            parts.append(exact[:, :, offset + high : offset + max(0, first + L - sinks)])
        else:
            parts.append(exact[:, :, offset + low : offset + max(0, first + L - sinks)])
        tokens[side] = torch.cat([part.to(q.dtype) for part in parts], dim=2)
    # The queries' own tokens are the last of these, and the only ones that some query may not see.
    before = tokens["key"].shape[2] - L
    keys, values = (tokens[side][:, :, before:].repeat_interleave(G, dim=1) for side in SIDES)
    found = _flash(q.reshape(b, K * G, L, D), keys, values, True, options.scaling)
    found = found[0].reshape(b, K, G * L, D).float(), found[1].reshape(b, K, G * L)
    folded = q.reshape(b, K, G * L, D)
    if before:
        keys, values = (tokens[side][:, :, :before] for side in SIDES)
        found = _merged(found, _flash(folded, keys, values, False, options.scaling))
    for start in range(0, low, SCRATCH_TOKENS):
        stop = min(low, start + SCRATCH_TOKENS)
        keys, values = (unpacked(store, side, rows, start, stop, q.dtype) for side in SIDES)
        found = _merged(found, _flash(folded, keys, values, False, options.scaling))
    return found[0].view(b, K, G, L, D), found[1].view(b, K, G, L)


def unpacked(store: HeadStore, side: str, rows: list[int], start: int, stop: int, dtype) -> torch.Tensor:
    """Packed body tokens [start, stop), [rows, kv_heads, stop - start, head_dim], as exact ones are, by the unpack
    kernel where it serves the codec."""
    if store.serving(dtype).no_unpack[side] is not None:
        return decoded(store, side, rows, start, stop, torch.float32).to(dtype)
    framed = side == "key" and store.group.frame is not None
    first = start // store.group.layout.page_tokens
    begin = first * store.group.layout.page_tokens
    shape = len(rows), store.heads, stop - begin, store.group.head_dim
    scratch = torch.empty(shape, dtype=torch.float32 if framed else dtype, device=store.pool.device)
    lengths = torch.full(shape[:1], stop, dtype=torch.int32, device=scratch.device)
    unpack_pages(pages_of(store, rows), side, lengths, scratch, first_page=first, impl="triton")
    numbers = scratch[:, :, start - begin :]
    return unframed(store, numbers, rows, start, stop).to(dtype) if framed else numbers


def _merged(a: Partial, b: Partial) -> Partial:
    """Softmax over the union of two sets of tokens, in float32; a query that sees nothing in one has -inf there."""
    (left, own), (right, other) = a, b
    lse = torch.logaddexp(own, other)
    out = left * (own - lse).exp().unsqueeze(-1)
    return out.addcmul_(right.float(), (other - lse).exp().unsqueeze(-1)), lse


def _flash(q, k, v, causal: bool, scale: float) -> Partial:
    """Attention of q [b, H, L, D] over k, v [b, H, n, D] without a score matrix: output like q, log-sum-exp fp32."""
    aten = torch.ops.aten
    # These operators ask nobody: a vector must be in one piece, or they read others.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)[:2]
    if q.dtype in (torch.float16, torch.bfloat16):
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]
    out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)[:2]
    return out, lse[..., : q.shape[2]]
