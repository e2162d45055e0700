"""Merge the partial results of splits and exact tokens into one softmax."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["items"])
def decode_merge(
    out,
    partial,
    partial_lse,
    spans,
    sink_logits,
    lse,
    items,
    out_batch_stride,
    out_head_stride,
    out_token_stride,
    HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
    EXACT: tl.constexpr,
    SINK_LOGITS: tl.constexpr,
):
    """Grid (B, KV heads, HEADS * QUERIES): one query vector each.

    partial      [items + B, KV heads, HEADS * QUERIES, D] fp32 and partial_lse likewise, base 2; spans [B, 2] int32:
                 first item of a sequence and their number. EXACT: item ``items + b`` holds sequence b's exact tokens.
    sink_logits  [heads] fp32: one learned logit a query head, if SINK_LOGITS.
    out          by strides; lse [B, KV heads, HEADS * QUERIES], natural logarithm.
    """
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    column = tl.program_id(2)
    heads = tl.num_programs(1)
    first = tl.load(spans + sequence * 2)
    count = tl.load(spans + sequence * 2 + 1)
    d = tl.arange(0, BLOCK_D)
    s = tl.arange(0, SPLITS)
    top = -1e30
    total = 0.0
    acc = tl.full([BLOCK_D], 0.0, tl.float32)
    for start in range(0, count + EXACT, SPLITS):
        real = start + s < count + EXACT
        item = tl.where(start + s < count, first + start + s, items + sequence)
        at = (item.to(tl.int64) * heads + head) * (HEADS * QUERIES) + column
        own = tl.load(partial_lse + at, mask=real, other=float("-inf"))
        new = tl.maximum(top, tl.max(own, 0))
        share = tl.exp2(own - new)
        x = tl.load(
            partial + at[:, None] * D + d[None, :], mask=(own > float("-inf"))[:, None] & (d < D)[None, :], other=0.0
        )
        shrink = tl.exp2(top - new)
        acc = acc * shrink + tl.sum(x * share[:, None], 0)
        total = total * shrink + tl.sum(share, 0)
        top = new
    if SINK_LOGITS:
        sink = tl.load(sink_logits + head * HEADS + column // QUERIES).to(tl.float32) * LOG2E
        new = tl.maximum(top, sink)
        shrink = tl.exp2(top - new)
        acc = acc * shrink
        total = total * shrink + tl.exp2(sink - new)
        top = new
    seen = total > 0.0
    acc = tl.where(seen, acc / tl.where(seen, total, 1.0), 0.0)
    to = out + sequence.to(tl.int64) * out_batch_stride
    to = to + (head * HEADS + column // QUERIES).to(tl.int64) * out_head_stride + column % QUERIES * out_token_stride
    tl.store(to + d, acc.to(out.dtype.element_ty), mask=d < D)
    value = tl.where(seen, (top + tl.log2(tl.where(seen, total, 1.0))) / LOG2E, float("-inf"))
    tl.store(lse + (sequence.to(tl.int64) * heads + head) * (HEADS * QUERIES) + column, value)
