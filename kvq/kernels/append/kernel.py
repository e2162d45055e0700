"""One decode step's tokens: pack what the flush rules release, then store the new tokens, in one launch.

Nothing looks at the host: how much is packed follows from counters on the device, which ``advance`` moves once a step.
"""

import triton
import triton.language as tl

from kvq.kernels.append.advance import COUNTERS
from kvq.kernels.pack.kernel import pack_page


@triton.jit
def _store_new(
    x,
    ring,
    sink_ring,
    t,
    position,
    sinks,
    capacity,
    x_token_stride,
    ring_token_stride,
    sink_token_stride,
    D: tl.constexpr,
    EVERY: tl.constexpr,
):
    """Store new token t, which stands at ``position``, as a sink or in the ring."""
    d = tl.arange(0, EVERY)
    value = tl.load(x + t * x_token_stride + d, mask=d < D, other=0.0).to(ring.dtype.element_ty)
    if position < sinks:
        tl.store(sink_ring + position * sink_token_stride + d, value, mask=d < D)
    else:
        tl.store(ring + (position - sinks) % capacity * ring_token_stride + d, value, mask=d < D)


@triton.jit(do_not_specialize=["key_capacity", "value_capacity", "sinks", "table_stride"])
def append_tokens(
    keys,
    values,
    key_ring,
    value_ring,
    sink_keys,
    sink_values,
    counters,
    pool,
    table,
    limits,
    key_batch_stride,
    key_head_stride,
    key_token_stride,
    value_batch_stride,
    value_head_stride,
    value_token_stride,
    ring_key_batch_stride,
    ring_key_head_stride,
    ring_key_token_stride,
    key_capacity,
    ring_value_batch_stride,
    ring_value_head_stride,
    ring_value_token_stride,
    value_capacity,
    sink_batch_stride,
    sink_head_stride,
    sink_token_stride,
    sinks,
    table_stride,
    page_stride,
    key_numbers,
    value_numbers,
    K: tl.constexpr,
    V: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    RECORD: tl.constexpr,
    NEW: tl.constexpr,
    EVERY: tl.constexpr,
):
    """Grid (pages that a flush can touch, B, 2 * KV heads): keys first, then values.

    keys, values  [B, KV heads, NEW, head_dim]; only the tokens that ``counters`` counts are stored.
    """
    piece = tl.program_id(0)
    sequence = tl.program_id(1)
    side_head = tl.program_id(2)
    heads = tl.num_programs(2) // 2
    head = side_head % heads
    wide_head = head.to(tl.int64)
    wide = sequence.to(tl.int64)
    own = counters + sequence * COUNTERS
    before = tl.load(own)
    added = tl.load(own + 1) - before
    table_at = table + wide * table_stride
    sink_at = wide * sink_batch_stride + wide_head * sink_head_stride
    if side_head < heads:
        ring = key_ring + wide * ring_key_batch_stride + wide_head * ring_key_head_stride
        start, stop = tl.load(own + 2), tl.load(own + 3)
        page = start // K.page_tokens + piece
        if (start < stop) & (page * K.page_tokens < stop):
            base = pool + tl.load(table_at + page).to(tl.int64) * page_stride
            rows = key_ring + wide * ring_key_batch_stride
            tokens = rows, head, heads, ring_key_head_stride, ring_key_token_stride, 0, key_capacity
            records = base + head * RECORD, base + heads * RECORD
            span = page * K.page_tokens, start, stop
            pack_page(tokens, span, records, limits, key_numbers, K, KEY, False)
        if piece == 0:
            x = keys + wide * key_batch_stride + wide_head * key_head_stride
            for t in range(0, NEW):
                if t < added:
                    _store_new(
                        x,
                        ring,
                        sink_keys + sink_at,
                        t,
                        before + t,
                        sinks,
                        key_capacity,
                        key_token_stride,
                        ring_key_token_stride,
                        sink_token_stride,
                        K.head_dim,
                        EVERY,
                    )
    else:
        ring = value_ring + wide * ring_value_batch_stride + wide_head * ring_value_head_stride
        start, stop = tl.load(own + 4), tl.load(own + 5)
        page = start // V.page_tokens + piece
        if (start < stop) & (page * V.page_tokens < stop):
            base = pool + tl.load(table_at + page).to(tl.int64) * page_stride
            rows = value_ring + wide * ring_value_batch_stride
            tokens = rows, head, heads, ring_value_head_stride, ring_value_token_stride, 0, value_capacity
            records = base + head * RECORD, base + heads * RECORD
            span = page * V.page_tokens, start, stop
            pack_page(tokens, span, records, limits + head, value_numbers, V, VALUE, V.limited)
        if piece == 0:
            x = values + wide * value_batch_stride + wide_head * value_head_stride
            for t in range(0, NEW):
                if t < added:
                    _store_new(
                        x,
                        ring,
                        sink_values + sink_at,
                        t,
                        before + t,
                        sinks,
                        value_capacity,
                        value_token_stride,
                        ring_value_token_stride,
                        sink_token_stride,
                        V.head_dim,
                        EVERY,
                    )
