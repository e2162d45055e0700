"""Exact tokens as one more split: sinks, tokens that are packed on one side only, and the recent window.

The state is that of packed tokens (``split``), in its units, so one epilogue and one merge serve all.
"""

import triton
import triton.language as tl

from kvq.kernels.decode_attention.program import (
    LOG2E,
    bounded,
    empty_state,
    hidden,
    largest_shift,
    load_query,
    locate,
    query_exponent,
    store_partial,
)
from kvq.kernels.decode_attention.scores import packed_scores, turned_query
from kvq.kernels.decode_attention.tile import scaled
from kvq.kernels.decode_attention.turn import load_turned, power_of_two, turn, turned_exponent
from kvq.kernels.decode_attention.values import add_packed_values, softmax_step
from kvq.kernels.device.sections import head_channels, operands, slice_at
from kvq.kernels.device.words import known


@triton.jit
def _product(a, b, ASM: tl.constexpr):
    """a @ b in fp32; factors of one dtype, in full precision for fp32."""
    if a.dtype == tl.float32:
        return tl.dot(a, b, input_precision="ieee")
    elif a.dtype == tl.bfloat16 and ASM == 0:
        # The interpreter multiplies the bit patterns of bf16 numbers.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b)


@triton.jit
def _weighted(values, weights, shift, ASM: tl.constexpr):
    """values [W, C, R] @ weights [W, R, H] (times 2^shift) with the weights exact to 16 bits or better."""
    if values.dtype == tl.float32:
        return _product(values, weights, ASM)
    elif values.dtype == tl.bfloat16:
        high = weights.to(tl.bfloat16)
        low = (weights - high.to(tl.float32)).to(tl.bfloat16)
        return _product(values, high, ASM) + _product(values, low, ASM)
    else:
        # fp16 ends at 65504, so its weights have a power of two of their own.
        return tl.dot(values, (weights * tl.exp2(14.0 - shift)).to(tl.float16)) * tl.exp2(shift - 14.0)


@triton.jit
def _load_exact_query(at, real, dtype: tl.constexpr, K: tl.constexpr, W: tl.constexpr):
    """The query vectors as they are, operands [W, C, H] in the dtype of the exact keys."""
    vectors = ()
    for n in tl.static_range(operands(K)):
        channel = head_channels(n, K)[:, None]
        x = tl.load(at[None, :] + channel, mask=real[None, :] & (channel < K.head_dim), other=0.0).to(dtype)
        vectors = vectors + (tl.broadcast_to(x[None, :, :], [W, slice_at(K, n).block, x.shape[1]]),)
    return vectors


@triton.jit
def _exact_scores(base, slot, token_stride, keep, vectors, factor, K: tl.constexpr, T: tl.constexpr, ASM: tl.constexpr):
    """Scores of exact keys by block, [W, R, H], times factor. slot, keep: by block, [W, R]."""
    scores = ()
    for b in tl.static_range(known(T.blocks)):
        total = tl.full([T.warps, T.rows, vectors[0].shape[2]], 0.0, tl.float32)
        for n in tl.static_range(operands(K)):
            channel = head_channels(n, K)[None, None, :]
            at = base + slot[b].to(tl.int64)[:, :, None] * token_stride + channel
            keys = tl.load(at, mask=keep[b][:, :, None] & (channel < K.head_dim), other=0.0)
            total += _product(keys, vectors[n], ASM)
        scores = scores + (total * factor,)
    return scores


@triton.jit
def _add_exact_values(
    state,
    base,
    slot,
    token_stride,
    keep,
    shrink,
    weights,
    shift,
    factor,
    V: tl.constexpr,
    T: tl.constexpr,
    ASM: tl.constexpr,
):
    """Add exact values, times factor, to the value state (see ``add_packed_values``)."""
    offsets, biases, sums = state
    if V.terms == 2 and not V.by_channel:
        offsets = scaled(offsets, shrink)
    if V.kind == "affine" and not V.by_channel:
        biases = scaled(biases, shrink)
    added = ()
    for n in tl.static_range(operands(V)):
        channel = head_channels(n, V)[None, :, None]
        total = sums[n] * shrink
        for b in tl.static_range(known(T.blocks)):
            at = base + slot[b].to(tl.int64)[:, None, :] * token_stride + channel
            values = tl.load(at, mask=keep[b][:, None, :] & (channel < V.head_dim), other=0.0)
            total += _weighted(values, weights[b], shift, ASM) * factor
        added = added + (total,)
    return offsets, biases, added


@triton.jit
def _tokens_of(i, first, end, offset, capacity, K: tl.constexpr, T: tl.constexpr):
    """Round i of exact tokens [first, end): (token of block 0 [W, R], slots and existence by block)."""
    tile = (i * T.warps + tl.arange(0, T.warps))[:, None]
    r = tl.arange(0, T.rows)[None, :]
    if T.pages == 1:
        token = tile // T.per_page * K.page_tokens + tile % T.per_page * T.rows + r
    else:
        token = (tile * T.pages + r // T.stride) * K.page_tokens + r % T.stride
    slot = ()
    keep = ()
    for b in tl.static_range(known(T.blocks)):
        own = token + b * T.stride
        exists = (own >= first) & (own < end)
        keep = keep + (exists,)
        slot = slot + (tl.where(exists, (own + offset) % capacity, 0),)
    return token, slot, keep


@triton.jit(
    do_not_specialize=[
        "table_stride",
        "key_capacity",
        "value_capacity",
        "sinks",
        "window",
        "items",
        "key_book",
        "value_book",
        "frame_stride",
    ]
)
def decode_exact(
    q,
    pool,
    table,
    lengths,
    positions,
    value_limit,
    out,
    lse,
    keys,
    values,
    key_offsets,
    value_offsets,
    sink_keys,
    sink_values,
    q_batch_stride,
    q_head_stride,
    q_token_stride,
    table_stride,
    page_stride,
    key_batch_stride,
    key_head_stride,
    key_token_stride,
    key_capacity,
    value_batch_stride,
    value_head_stride,
    value_token_stride,
    value_capacity,
    sink_batch_stride,
    sink_head_stride,
    sink_token_stride,
    sinks,
    scale,
    key_scale,
    value_scale,
    softcap,
    window,
    items,
    key_book,
    value_book,
    frame,
    frame_stride,
    growth,
    matrix_scale,
    K: tl.constexpr,
    V: tl.constexpr,
    T: tl.constexpr,
    RECORD: tl.constexpr,
    HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    H: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    C: tl.constexpr,
    BLOCKS: tl.constexpr,
    MATRIX: tl.constexpr,
    MEAN: tl.constexpr,
    MIXED_KEY: tl.constexpr,
    MIXED_VALUE: tl.constexpr,
    SINKS: tl.constexpr,
    ASM: tl.constexpr,
):
    """Grid (B, KV heads, blocks of H query columns); writes item ``items + b`` of ``decode_split``'s partial results.

    lengths     [B, 4] int32: tokens after the sinks that are packed on both sides, as keys, as values, and all of them.
    keys        exact keys [B, KV heads, key_capacity, head_dim] by strides; token t is at ``t + key_offsets[b]`` modulo
                the capacity. values likewise. sink_keys, sink_values [B, KV heads, sinks, head_dim] share strides.
    MIXED_KEY   some tokens may be packed as keys only; MIXED_VALUE: as values only.
    """
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    low = tl.load(lengths + sequence * 4)
    key_end = tl.load(lengths + sequence * 4 + 1)
    value_end = tl.load(lengths + sequence * 4 + 2)
    end = tl.load(lengths + sequence * 4 + 3)
    position = tl.load(positions + sequence)
    column = tl.program_id(2) * H + tl.arange(0, H)
    real = column < HEADS * QUERIES
    wide = sequence.to(tl.int64)
    wide_head = head.to(tl.int64)
    q_at = q + wide * q_batch_stride + head * HEADS * q_head_stride
    vectors_at = q_at + column // QUERIES * q_head_stride + column % QUERIES * q_token_stride
    if T.frame == 0:
        queries, down = load_query(vectors_at, real, K, T.warps)
    else:
        exponent = turned_exponent(vectors_at, real, growth, query_exponent(K), K.head_dim)
        up = power_of_two(exponent) * matrix_scale
        down, bias_factor = 1.0 / up, up / key_scale
        program = ((items + sequence) * tl.num_programs(1) + head).to(tl.int64) * tl.num_programs(2) + tl.program_id(2)
        turned, turned_bias = frame[5] + program * (BLOCKS * C * K.head_dim), frame[6] + program * (BLOCKS * C)
    exact_query = _load_exact_query(vectors_at, real, keys.dtype.element_ty, K, T.warps)
    # Scores and values of exact tokens, in the units of packed ones.
    key_factor = 1.0 / (down * key_scale)
    value_factor = 1.0 / value_scale
    kappa = scale * key_scale * LOG2E * down
    cap_scale = 1.0
    if SOFTCAP:
        cap_scale = kappa * (2.0 / softcap)
        kappa = LOG2E
    shift = largest_shift(value_limit + head, V)
    softmax, total = empty_state(V, T, H)
    position = position + column % QUERIES

    key_at = keys + wide * key_batch_stride + wide_head * key_head_stride
    value_at = values + wide * value_batch_stride + wide_head * value_head_stride
    key_offset = tl.load(key_offsets + sequence)
    value_offset = tl.load(value_offsets + sequence)
    if SINKS:
        sink_at = wide * sink_batch_stride + wide_head * sink_head_stride
        for i in tl.range(0, tl.cdiv(sinks, T.round), num_stages=1):
            token, slot, keep = _tokens_of(i, 0, sinks, 0, sinks, K, T)
            scores = _exact_scores(
                sink_keys + sink_at, slot, sink_token_stride, keep, exact_query, key_factor, K, T, ASM
            )
            if SOFTCAP:
                scores = bounded(scores, softcap, cap_scale, T, ASM)
            scores = hidden(scores, keep, token, position, window, T, True, WINDOW)
            softmax, shrink, weights = softmax_step(softmax, scores, kappa, shift, T, ASM)
            total = _add_exact_values(
                total,
                sink_values + sink_at,
                slot,
                sink_token_stride,
                keep,
                shrink,
                weights,
                shift,
                value_factor,
                V,
                T,
                ASM,
            )
    # Counted from the first token after the sinks from here on.
    position -= sinks
    high = low
    if MIXED_KEY or MIXED_VALUE:
        high = tl.maximum(key_end, value_end)
        base = pool + head * RECORD
        shared = (tl.num_programs(1) - head) * RECORD
        table_at = table + wide * table_stride
        last_page = (high - 1) // K.page_tokens
        for i in tl.range(low // T.round, tl.cdiv(high, T.round), num_stages=1):
            records, row, start = locate(i, base, shared, table_at, page_stride, tl.maximum(last_page, 0), K, T, True)
            packed_key = MIXED_KEY and (not MIXED_VALUE or key_end > value_end)
            token, key_slot, keep = _tokens_of(i, low, high, key_offset, key_capacity, K, T)
            token, value_slot, keep = _tokens_of(i, low, high, value_offset, value_capacity, K, T)
            if packed_key:
                if T.frame > 0:
                    first_block = i * T.round // T.frame
                    tl.debug_barrier()
                    turn(
                        first_block, tl.cdiv(tl.minimum((i + 1) * T.round, key_end), T.frame), q_at, q_head_stride,
                        q_token_stride, tl.program_id(2) * H, frame[0] + wide * frame_stride, head, frame, turned,
                        turned_bias, exponent, bias_factor, K.head_dim, HEADS, QUERIES, C, MATRIX,
                        MEAN,
                    )  # fmt: skip
                    tl.debug_barrier()
                    found = load_turned(turned, turned_bias, start - first_block * T.frame, K, T, H, C, MEAN)
                    queries = turned_query(found, K, T, ASM)
                scores = packed_scores(records, row, keep, queries, key_book, K, T, True, ASM)
            else:
                scores = _exact_scores(key_at, key_slot, key_token_stride, keep, exact_query, key_factor, K, T, ASM)
            if SOFTCAP:
                scores = bounded(scores, softcap, cap_scale, T, ASM)
            scores = hidden(scores, keep, token, position, window, T, True, WINDOW)
            softmax, shrink, weights = softmax_step(softmax, scores, kappa, shift, T, ASM)
            if packed_key:
                total = _add_exact_values(
                    total,
                    value_at,
                    value_slot,
                    value_token_stride,
                    keep,
                    shrink,
                    weights,
                    shift,
                    value_factor,
                    V,
                    T,
                    ASM,
                )
            else:
                total = add_packed_values(total, records, row, keep, shrink, weights, value_book, V, T, True, ASM)
    for i in tl.range(high // T.round, tl.cdiv(end, T.round), num_stages=1):
        token, key_slot, keep = _tokens_of(i, high, end, key_offset, key_capacity, K, T)
        token, value_slot, keep = _tokens_of(i, high, end, value_offset, value_capacity, K, T)
        scores = _exact_scores(key_at, key_slot, key_token_stride, keep, exact_query, key_factor, K, T, ASM)
        if SOFTCAP:
            scores = bounded(scores, softcap, cap_scale, T, ASM)
        scores = hidden(scores, keep, token, position, window, T, True, WINDOW)
        softmax, shrink, weights = softmax_step(softmax, scores, kappa, shift, T, ASM)
        total = _add_exact_values(
            total, value_at, value_slot, value_token_stride, keep, shrink, weights, shift, value_factor, V, T, ASM
        )
    slot = ((items + sequence) * tl.num_programs(1) + head).to(tl.int64) * (HEADS * QUERIES) + tl.program_id(2) * H
    store_partial((softmax, total), out + slot * V.head_dim, lse + slot, kappa, shift, value_scale, real, V, T, ASM)
