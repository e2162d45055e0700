"""Split-KV decode attention over packed pages: one program reads some rounds of one sequence and one KV head."""

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
from kvq.kernels.decode_attention.turn import load_turned, power_of_two, turn, turned_exponent
from kvq.kernels.decode_attention.values import add_packed_values, softmax_step
from kvq.kernels.device.words import known

# A work item: sequence (-1: none), first round, number of rounds, unused.
ITEM = tl.constexpr(4)


@triton.jit
def _round(
    i,
    state,
    queries,
    turned,
    turned_bias,
    first_block,
    kappa,
    shift,
    cap_scale,
    softcap,
    base,
    shared,
    table_at,
    page_stride,
    length,
    position,
    window,
    key_book,
    value_book,
    K: tl.constexpr,
    V: tl.constexpr,
    T: tl.constexpr,
    H: tl.constexpr,
    C: tl.constexpr,
    MEAN: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
    ASM: tl.constexpr,
):
    """Attend to round i, one tile a warp. turned, turned_bias: queries of the blocks of the frame from ``first_block``
    on."""
    softmax, values = state
    last_page = (length - 1) // K.page_tokens
    records, row, start = locate(i, base, shared, table_at, page_stride, last_page, K, T, MASKED)
    keep = ()
    for b in tl.static_range(known(T.blocks)):
        keep = keep + (start + row + b * T.stride < length,)
    if T.frame > 0:
        found = load_turned(turned, turned_bias, start - first_block * T.frame, K, T, H, C, MEAN)
        queries = turned_query(found, K, T, ASM)
    scores = packed_scores(records, row, keep, queries, key_book, K, T, MASKED, ASM)
    if SOFTCAP:
        scores = bounded(scores, softcap, cap_scale, T, ASM)
    if MASKED:
        scores = hidden(scores, keep, start + row, position, window, T, False, WINDOW)
    softmax, shrink, weights = softmax_step(softmax, scores, kappa, shift, T, ASM)
    return softmax, add_packed_values(values, records, row, keep, shrink, weights, value_book, V, T, MASKED, ASM)


@triton.jit
def _rounds(
    first,
    end,
    full_first,
    full_end,
    state,
    queries,
    turned,
    turned_bias,
    first_block,
    kappa,
    shift,
    cap_scale,
    softcap,
    base,
    shared,
    table_at,
    page_stride,
    length,
    position,
    window,
    key_book,
    value_book,
    K: tl.constexpr,
    V: tl.constexpr,
    T: tl.constexpr,
    H: tl.constexpr,
    C: tl.constexpr,
    MEAN: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
):
    """Attend to rounds [first, end), of which [full_first, full_end) need no mask."""
    full_first = tl.minimum(tl.maximum(full_first, first), end)
    full_end = tl.maximum(tl.minimum(full_end, end), full_first)
    for i in tl.range(full_first, full_end, num_stages=STAGES):
        state = _round(
            i, state, queries, turned, turned_bias, first_block,
            kappa, shift, cap_scale, softcap, base, shared, table_at, page_stride, length, position, window, key_book,
            value_book, K, V, T, H, C, MEAN, SOFTCAP, WINDOW, False, ASM,
        )  # fmt: skip
    before = full_first - first
    for j in tl.range(0, before + end - full_end, num_stages=1):
        i = tl.where(j < before, first + j, full_end + j - before)
        state = _round(
            i, state, queries, turned, turned_bias, first_block,
            kappa, shift, cap_scale, softcap, base, shared, table_at, page_stride, length, position, window, key_book,
            value_book, K, V, T, H, C, MEAN, SOFTCAP, WINDOW, True, ASM,
        )  # fmt: skip
    return state


@triton.jit(do_not_specialize=["table_stride", "window", "first_token", "key_book", "value_book", "frame_stride"])
def decode_split(
    q,
    pool,
    table,
    items,
    lengths,
    positions,
    value_limit,
    out,
    lse,
    q_batch_stride,
    q_head_stride,
    q_token_stride,
    table_stride,
    page_stride,
    scale,
    key_scale,
    value_scale,
    softcap,
    window,
    first_token,
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
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
):
    """Grid (items, KV heads, blocks of H query columns). Column c: query head ``c // QUERIES``, token ``c % QUERIES``.

    q        [B, heads, QUERIES, head_dim] by strides. pool: bytes; page number n of the table starts at n * page_stride
             and holds one record of RECORD bytes a KV head.
    items    work list [items, 4] int32. lengths [B]: packed tokens, the first of which stands at position first_token.
    positions  [B] int32: of query token 0 of each sequence, if WINDOW. Packed tokens are older than every query.
    key_book, value_book   registers of ``fields.book_registers``, or () where a side has no book.
    frame    of ``KeyFrame`` index (by ``frame_stride``), turns, partner, matrix (if MATRIX) and mean (if MEAN); then
             room for turned queries of every program, [BLOCKS, C, head_dim] fp16, and their biases, [BLOCKS, C] fp32.
             Queries are turned for CHUNK rounds at a time. () if T has no frame.
    out      [items, KV heads, HEADS * QUERIES, head_dim] fp32; lse the same without head_dim, base 2.
    """
    item = tl.program_id(0)
    head = tl.program_id(1)
    sequence = tl.load(items + item * ITEM)
    if sequence < 0:
        return
    first = tl.load(items + item * ITEM + 1)
    end = first + tl.load(items + item * ITEM + 2)
    length = tl.load(lengths + sequence)
    column = tl.program_id(2) * H + tl.arange(0, H)
    real = column < HEADS * QUERIES
    q_at = q + sequence.to(tl.int64) * q_batch_stride + head * HEADS * q_head_stride
    if T.frame == 0:
        # In one product: as the sum above it costs registers that sm_100 then takes from the stack.
        vectors_at = q + sequence.to(tl.int64) * q_batch_stride
        vectors_at = vectors_at + (head * HEADS + column // QUERIES) * q_head_stride + column % QUERIES * q_token_stride
        queries, down = load_query(vectors_at, real, K, T.warps)
    else:
        vectors_at = q_at + column // QUERIES * q_head_stride + column % QUERIES * q_token_stride
        exponent = turned_exponent(vectors_at, real, growth, query_exponent(K), K.head_dim)
        up = power_of_two(exponent) * matrix_scale
        down, bias_factor = 1.0 / up, up / key_scale
    kappa = scale * key_scale * LOG2E * down
    cap_scale = 1.0
    if SOFTCAP:
        # A bounded score is a plain number again, whose exponent of 2 is log2(e) times it.
        cap_scale = kappa * (2.0 / softcap)
        kappa = LOG2E
    shift = largest_shift(value_limit + head, V)
    position = 0 * column
    full_first, full_end = first, length // T.round
    if WINDOW:
        # Counted from the first packed token from here on.
        position = tl.load(positions + sequence) - first_token
        full_first = tl.maximum(full_first, tl.cdiv(tl.maximum(position + QUERIES - window, 0), T.round))
        position = position + column % QUERIES

    state = empty_state(V, T, H)
    base = pool + head * RECORD
    shared = (tl.num_programs(1) - head) * RECORD
    table_at = table + sequence.to(tl.int64) * table_stride
    if T.frame == 0:
        state = _rounds(
            first, end, full_first, full_end, state, queries, q, q, 0,
            kappa, shift, cap_scale, softcap, base, shared, table_at, page_stride, length, position, window, key_book,
            value_book, K, V, T, H, C, MEAN, SOFTCAP, WINDOW, STAGES, ASM,
        )  # fmt: skip
    else:
        program = (item * tl.num_programs(1) + head).to(tl.int64) * tl.num_programs(2) + tl.program_id(2)
        turned, turned_bias = frame[5] + program * (BLOCKS * C * K.head_dim), frame[6] + program * (BLOCKS * C)
        for start in tl.range(first, end, CHUNK, num_stages=1):
            stop = tl.minimum(start + CHUNK, end)
            first_block = start * T.round // T.frame
            # Whatever was turned before has been read, and what is turned now is read by all.
            tl.debug_barrier()
            turn(
                first_block, tl.cdiv(tl.minimum(stop * T.round, length), T.frame), q_at, q_head_stride, q_token_stride,
                tl.program_id(2) * H, frame[0] + sequence.to(tl.int64) * frame_stride, head, frame, turned, turned_bias,
                exponent, bias_factor, K.head_dim, HEADS, QUERIES, C, MATRIX, MEAN,
            )  # fmt: skip
            tl.debug_barrier()
            state = _rounds(
                start, stop, full_first, full_end, state, (), turned, turned_bias, first_block,
                kappa, shift, cap_scale, softcap, base, shared, table_at, page_stride, length, position, window,
                key_book, value_book, K, V, T, H, C, MEAN, SOFTCAP, WINDOW, STAGES, ASM,
            )  # fmt: skip
    slot = (item * tl.num_programs(1) + head).to(tl.int64) * (HEADS * QUERIES) + tl.program_id(2) * H
    store_partial(state, out + slot * V.head_dim, lse + slot, kappa, shift, value_scale, real, V, T, ASM)
