"""Split-KV decode attention over packed pages: one program reads some rounds of one sequence and one KV head."""

import triton
import triton.language as tl

from kvq.kernels.decode_attention.tile import add, add_packed_values, packed_scores, softmax_step, turned_query
from kvq.kernels.decode_attention.turn import load_turned, power_of_two, turn, turned_exponent
from kvq.kernels.device.sections import (
    block_at,
    chunk_at,
    group_of,
    head_channels,
    operands,
    slice_at,
    slice_number,
    slices,
)
from kvq.kernels.device.words import bias_of, exp2, known

LOG2E = tl.constexpr(1.4426950408889634)
# Below every score and finite, so that differences stay defined.
LOWEST = tl.constexpr(-1e30)
# A work item: sequence (-1: none), first round, number of rounds, unused.
ITEM = tl.constexpr(4)


@triton.constexpr_function
def _room(S):
    """log2 of a factor that a number of at most 1 may have so that it times any scale stays in fp16.

    A scale of plain codes is at most the fp16 range over their steps, any other at most the largest fp16 number.
    """
    plain = S.kind == "affine" and S.meta == "float16" and S.norm_offset < 0 and not S.evenly
    return {2: 0, 3: 1, 4: 2, 8: 6}[S.bits] if plain else 0


@triton.constexpr_function
def query_exponent(K):
    """Queries are scaled to an absolute maximum in [2^(n-1), 2^n)."""
    return _room(K) if K.by_channel else 8


@triton.jit
def largest_shift(limit_at, V: tl.constexpr):
    """log2 of what weights are multiplied by. ``limit_at``: the largest scale of this KV head's values, if limited."""
    if V.limited:
        largest = tl.maximum(tl.load(limit_at), 2.0**-24)
        # A weight times a scale then reaches up to 2^15, and fp16 ends at twice that.
        shift = 14.0 - ((largest.to(tl.int32, bitcast=True) >> 23) - 127).to(tl.float32)
    else:
        # A norm of any size may be multiplied with weights.
        shift = 14.0 if V.norm_offset < 0 else 0.0
    return shift


@triton.jit
def load_query(at, real, K: tl.constexpr, W: tl.constexpr):
    """The one query of ``packed_scores``, and the power of two that undoes its scaling.

    at: pointers [H] to the columns' vectors.
    """
    H: tl.constexpr = real.shape[0]
    vectors = ()
    largest = 0.0
    for n in tl.static_range(operands(K)):
        channel = head_channels(n, K)[:, None]
        x = tl.load(at[None, :] + channel, mask=real[None, :] & (channel < K.head_dim), other=0.0).to(tl.float32)
        if slice_at(K, n).kind != "none":
            largest = tl.maximum(largest, tl.max(tl.abs(x)))
        vectors = vectors + (x,)
    exponent = query_exponent(K) - 1 - ((largest.to(tl.int32, bitcast=True) >> 23) - 127)
    exponent = tl.minimum(tl.maximum(exponent, -100), 100)
    up = ((127 + exponent) << 23).to(tl.float32, bitcast=True)
    down = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    factors = ()
    sums = ()
    negative = ()
    for g in tl.static_range(known(slices(K) * K.groups)):
        sums = sums + (tl.full([1, 1, H], 0.0, tl.float32),)
    for g in tl.static_range(known(0 if K.by_channel else K.parts * K.groups)):
        negative = negative + (tl.full([1, 1, H], 0.0, tl.float32),)
    for n in tl.static_range(operands(K)):
        x = (vectors[n] * up).to(tl.float16)
        total = tl.sum(x.to(tl.float32), 0)[None, None, :]
        sums = add(sums, slice_number(K, n) * K.groups + group_of(K, chunk_at(K, n), block_at(K, n)), total)
        if not K.by_channel:
            for part in tl.static_range(known(K.parts)):
                bias = bias_of(K, part * K.chunks + chunk_at(K, n))
                negative = add(negative, part * K.groups + group_of(K, chunk_at(K, n), block_at(K, n)), total * -bias)
        factors = factors + (tl.broadcast_to(x[None, :, :], [W, slice_at(K, n).block, H]),)
    return ((factors, sums, negative, 0.0),), down


@triton.jit
def empty_state(V: tl.constexpr, T: tl.constexpr, H: tl.constexpr):
    """(softmax state, value state) before any token."""
    softmax = (tl.full([T.warps, 1, H], LOWEST, tl.float32), tl.full([T.warps, T.fold, H], 0.0, tl.float32))
    offsets = ()
    biases = ()
    for g in tl.static_range(known(V.groups)):
        offsets = offsets + (tl.full([T.warps, T.fold, H], 0.0, tl.float32),)
        biases = biases + (tl.full([T.warps, 16, H], 0.0, tl.float32),)
    sums = ()
    for n in tl.static_range(operands(V)):
        sums = sums + (tl.full([T.warps, slice_at(V, n).block, H], 0.0, tl.float32),)
    return softmax, (offsets, biases, sums)


@triton.jit
def locate(i, base, shared, table_at, page_stride, last_page, K: tl.constexpr, T: tl.constexpr, MASKED: tl.constexpr):
    """Round i, for each warp: (records, row of block 0 within the page, the page's first token).

    records   pointers [W, 1 or R] to the head's record, and to that of all heads, ``shared`` bytes after it.
    """
    tile = (i * T.warps + tl.arange(0, T.warps))[:, None]
    r = tl.arange(0, T.rows)[None, :]
    if T.pages == 1:
        page = tile // T.per_page
        row = r if T.per_page == 1 else tile % T.per_page * T.rows + r
    else:
        page = tile * T.pages + r // T.stride
        row = r % T.stride
    # Beyond the end any page will do: what is read from it is masked.
    number = tl.load(table_at + (tl.minimum(page, last_page) if MASKED else page)).to(tl.int64)
    record = base + number * page_stride
    return (record, record + shared), row, page * K.page_tokens


@triton.jit
def bounded(scores, softcap, cap_scale, T: tl.constexpr, ASM: tl.constexpr):
    """softcap * tanh(score / softcap). cap_scale: what turns a score into the exponent of 2 that tanh needs."""
    bounded = ()
    for b in tl.static_range(known(T.blocks)):
        # tanh(x) = 1 - 2 / (1 + e^(2x)), safe at both ends.
        bounded = bounded + (softcap - 2.0 * softcap / (1.0 + exp2(scores[b] * cap_scale, ASM)),)
    return bounded


@triton.jit
def hidden(scores, keep, token, position, window, T: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Scores with -inf where a token does not exist or its query may not see it. token [W, R], position [H]."""
    masked = ()
    for b in tl.static_range(known(T.blocks)):
        see = keep[b][:, :, None]
        at = (token + b * T.stride)[:, :, None]
        if CAUSAL:
            see = see & (at <= position[None, None, :])
        if WINDOW:
            see = see & (at > position[None, None, :] - window)
        masked = masked + (tl.where(see, scores[b], float("-inf")),)
    return masked


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


@triton.jit
def store_partial(
    state, out_at, lse_at, kappa, shift, value_scale, real, V: tl.constexpr, T: tl.constexpr, ASM: tl.constexpr
):
    """Merge the warps and store output [H, head_dim] and log-sum-exp [H] (base 2; -inf where nothing was seen)."""
    top, total = state[0]
    offsets, biases, sums = state[1]
    H: tl.constexpr = real.shape[0]
    column = tl.arange(0, H)
    highest = tl.max(top, 0)
    share = exp2((top - highest[None, :, :]) * kappa, ASM)
    total = tl.sum(tl.sum(total * share, 1), 0)
    seen = total > 0.0
    inverse = tl.where(seen, 1.0 / tl.where(seen, total, 1.0), 0.0)
    tl.store(
        lse_at + column,
        tl.where(seen, tl.sum(highest, 0) * kappa - shift + tl.log2(tl.where(seen, total, 1.0)), float("-inf")),
        mask=real,
    )
    for n in tl.static_range(operands(V)):
        x = sums[n]
        if V.terms == 2 and not V.by_channel:
            x += tl.sum(offsets[group_of(V, chunk_at(V, n), block_at(V, n))], 1, keep_dims=True)
        if V.kind == "affine" and not V.by_channel:
            bias = biases[group_of(V, chunk_at(V, n), block_at(V, n))]
            if V.parts == 1:
                bias = tl.max(bias, 1, keep_dims=True) * bias_of(V, chunk_at(V, n))
            else:
                row = tl.arange(0, 16)[None, :, None]
                # Row 15 is what all fields have in common: no chunk has that number.
                bias = tl.sum(tl.where((row == chunk_at(V, n)) | (row == 15), bias, 0.0), 1, keep_dims=True)
            x -= bias
        x = tl.sum(x * share, 0) * (inverse * value_scale)[None, :]
        channel = head_channels(n, V)[:, None]
        tl.store(out_at + column[None, :] * V.head_dim + channel, x, mask=real[None, :] & (channel < V.head_dim))


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
