"""Scores of a tile's packed keys, and the queries that they are made with (``tile.py`` has shapes and algebra)."""

import triton
import triton.language as tl

from kvq.kernels.decode_attention.tile import (
    block_of,
    dot_into,
    load_planes,
    part_of,
    reads_masked,
    row_blocks,
    token_group,
    token_meta,
)
from kvq.kernels.decode_attention.turn import frame_of, frames
from kvq.kernels.device.sections import (
    block_at,
    chunk_at,
    first_operand,
    group_of,
    load_meta,
    load_norm,
    load_pair,
    load_range,
    local_channels,
    operands,
    slice_at,
    slice_number,
    slice_of,
    slices,
)
from kvq.kernels.device.words import bias_of, known


@triton.constexpr_function
def _scaled_tokens(K, T):
    """Tokens that a scaled query is for (axis channel)."""
    return min(K.group, T.frame) if T.frame else K.group


@triton.constexpr_function
def _scaled_of(K, T, b):
    """Which of the tile's scaled queries is block b's (axis channel)."""
    return b * T.stride // _scaled_tokens(K, T)


@triton.constexpr_function
def _opens_scaled(K, T, b):
    return b * T.stride % _scaled_tokens(K, T) == 0


@triton.constexpr_function
def _offset_key(K, T, b):
    """What the constant terms of a block's scores depend on: scaled query, and part of every slice (axis channel)."""
    return b * T.stride // _scaled_tokens(K, T), *(
        b * T.stride % S.unit // S.unit_rows for S in K.slices if S.kind != "none"
    )


@triton.constexpr_function
def _opens_offset(K, T, b):
    return all(_offset_key(K, T, b) != _offset_key(K, T, a) for a in range(b))


@triton.constexpr_function
def _offset_of(K, T, b):
    """Which of the different constant terms is block b's."""
    kinds = list(dict.fromkeys(_offset_key(K, T, a) for a in range(T.blocks)))
    return kinds.index(_offset_key(K, T, b))


@triton.constexpr_function
def _less_bias(K, T, b, n):
    """Minus the bias of operand n's codes in block b."""
    S = slice_at(K, n)
    return -bias_of(S, b * T.stride % S.unit // S.unit_rows * S.chunks + chunk_at(K, n))


@triton.constexpr_function
def _group_at(K, n):
    """Channel group of operand n."""
    S = slice_at(K, n)
    return 0 if S.groups == 1 else (chunk_at(K, n) * S.width + block_at(K, n) * S.block) // S.group


@triton.constexpr_function
def _sum_of(K, n):
    """Which sum of a query operand n belongs to."""
    return slice_number(K, n) * K.groups + _group_at(K, n)


@triton.constexpr_function
def _bias_at(K, part, n):
    """Bias of operand n's codes in a part (axis token)."""
    return bias_of(K, part * K.chunks + chunk_at(K, n))


@triton.jit
def packed_scores(
    records, row, keep, queries, book, K: tl.constexpr, T: tl.constexpr, MASKED: tl.constexpr, ASM: tl.constexpr
):
    """Scores of one tile, before the softmax scale: a tuple of T.blocks tensors [W, R, H].

    records (a head's record, that of all heads), pointers [W, 1 or R].
    row     [1 or W, R]: token of row r within its page, for block 0. keep: by block, [W, R], tokens that exist.
    queries by block of the frame, or one: (operands [W, C, H] fp16, their sums by slice or channel group, minus their
            bias sums by part and channel group, what is added to scores of keys in a frame).
    """
    if K.by_channel:
        scores = _scores_by_channel(records, row, queries, book, K, T, ASM)
        if K.norm_offset >= 0:
            lengths = ()
            for b in tl.static_range(known(T.blocks)):
                norm = load_norm(records, row + b * T.stride, keep[b], K, MASKED)
                lengths = lengths + (scores[b] * norm[:, :, None],)
            scores = lengths
    else:
        raw = _scores_by_token(records, row, keep, queries, book, K, T, MASKED, ASM)
        if not K.scaled:
            scores = raw
        else:
            scores = ()
            for b in tl.static_range(known(T.blocks)):
                sums = queries[frame_of(K, T, b)][1]
                scores = scores + (_scaled_scores(records, row, keep[b], raw, sums, b, K, T, MASKED, ASM),)
    if T.frame == 0:
        return scores
    else:
        moved = ()
        for b in tl.static_range(known(T.blocks)):
            moved = moved + (scores[b] + queries[frame_of(K, T, b)][3],)
        return moved


@triton.jit
def _scores_by_token(
    records, row, keep, queries, book, K: tl.constexpr, T: tl.constexpr, MASKED: tl.constexpr, ASM: tl.constexpr
):
    """Axis token: products with codes by block and channel group."""
    raw = ()
    for b in tl.static_range(known(T.blocks)):
        for g in tl.static_range(known(K.groups)):
            start = queries[frame_of(K, T, b)][2][part_of(K, T, b) * K.groups + g]
            raw = raw + (tl.broadcast_to(start, [T.warps, T.rows, start.shape[2]]),)
    for s in tl.static_range(row_blocks(K, T)):
        for c in tl.static_range(known(K.blocks)):
            planes = load_planes(
                records[0], row + s * T.stride, c * K.block, keep[s], book, K, reads_masked(K, MASKED), False, ASM
            )
            for f in tl.static_range(known(K.fields)):
                raw = dot_into(
                    raw,
                    block_of(K, T, f, s) * K.groups + group_of(K, f % K.chunks, c),
                    planes[f],
                    queries[frame_of(K, T, block_of(K, T, f, s))][0][f % K.chunks * K.blocks + c],
                )
    return raw


@triton.jit
def _scaled_scores(
    records,
    row,
    keep,
    raw,
    sums,
    b: tl.constexpr,
    K: tl.constexpr,
    T: tl.constexpr,
    MASKED: tl.constexpr,
    ASM: tl.constexpr,
):
    """Scale and minimum of block b's tokens, axis token."""
    scale, minimum = token_meta(records, row + b * T.stride, 0, keep, K, MASKED, ASM)
    total = raw[b * K.groups] * scale
    if K.terms == 2:
        total += minimum * sums[0]
    for g in tl.static_range(1, known(K.groups)):
        scale, minimum = token_meta(records, row + b * T.stride, g, keep, K, MASKED, ASM)
        total += raw[b * K.groups + g] * scale
        if K.terms == 2:
            total += minimum * sums[g]
    return total


@triton.jit
def turned_query(turned, K: tl.constexpr, T: tl.constexpr, ASM: tl.constexpr):
    """The queries of ``packed_scores`` from what ``load_turned`` found; sums are left to products, [W, R, H]."""
    queries = ()
    for j in tl.static_range(frames(K, T)):
        vectors, bias = turned[j]
        sums = ()
        negative = ()
        for g in tl.static_range(known(slices(K) * K.groups)):
            sums = sums + (tl.full([T.warps, T.rows, vectors[0].shape[2]], 0.0, tl.float32),)
        for g in tl.static_range(known(0 if K.by_channel else K.parts * K.groups)):
            negative = negative + (tl.full([T.warps, T.rows, vectors[0].shape[2]], 0.0, tl.float32),)
        for n in tl.static_range(operands(K)):
            if slice_at(K, n).range_offset >= 0 or (slice_at(K, n).terms == 2 and not K.by_channel):
                ones = tl.full([T.warps, T.rows, slice_at(K, n).block], 1.0, tl.float16)
                sums = dot_into(sums, _sum_of(K, n), ones, vectors[n])
            if not K.by_channel:
                for part in tl.static_range(known(K.parts)):
                    less = tl.full([T.warps, T.rows, K.block], -_bias_at(K, part, n), tl.float16)
                    negative = dot_into(negative, part * K.groups + _group_at(K, n), less, vectors[n])
        queries = queries + ((vectors, sums, negative, bias),)
    return queries


@triton.jit
def _scores_by_channel(records, row, queries, book, K: tl.constexpr, T: tl.constexpr, ASM: tl.constexpr):
    """Axis channel: every token group of the tile, and every block of the frame, has its own scaled query."""
    scaled = ()
    scores = ()
    minima = ()
    offsets = ()
    for b in tl.static_range(known(T.blocks)):
        if _opens_scaled(K, T, b):
            own, minimum = _scaled_query(records, queries[frame_of(K, T, b)], token_group(K, T, b), K, T, ASM)
            scaled = scaled + (own,)
            minima = minima + (minimum,)
        if _opens_offset(K, T, b):
            offsets = offsets + (_less_biases(minima[_scaled_of(K, T, b)], scaled[_scaled_of(K, T, b)], b, K, T),)
        scores = scores + (offsets[_offset_of(K, T, b)],)
    for i in tl.static_range(slices(K)):
        if slice_of(K, i).kind != "none":
            scores = _add_slice(scores, records, row, scaled, book, first_operand(K, i), slice_of(K, i), K, T, ASM)
    return scores


@triton.jit
def _add_slice(
    scores,
    records,
    row,
    scaled,
    book,
    first: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    T: tl.constexpr,
    ASM: tl.constexpr,
):
    """Scores with the products of one slice's codes; its operands begin at ``first`` of every group's in ``scaled``."""
    for s in tl.static_range(row_blocks(S, T)):
        for c in tl.static_range(known(S.blocks)):
            planes = load_planes(records[0], row + s * T.stride, c * S.block, row, book, S, False, False, ASM)
            for f in tl.static_range(known(S.fields)):
                own = scaled[_scaled_of(K, T, block_of(S, T, f, s))]
                scores = dot_into(scores, block_of(S, T, f, s), planes[f], own[first + f % S.chunks * S.blocks + c])
    return scores


@triton.jit
def _scaled_query(records, query, group: tl.constexpr, K: tl.constexpr, T: tl.constexpr, ASM: tl.constexpr):
    """Query operands times the scales of a token group, and q . minimum in every row, [W, R, H]."""
    vectors, sums, _, _ = query
    own = ()
    total = tl.full([T.warps, T.rows, vectors[0].shape[2]], 0.0, tl.float32)
    for i in tl.static_range(slices(K)):
        offset = tl.full([T.warps, T.rows, vectors[0].shape[2]], 0.0, tl.float32)
        for n in tl.static_range(first_operand(K, i), first_operand(K, i + 1)):
            if slice_of(K, i).kind == "none":
                own = own + (vectors[n],)
            else:
                scale, minimum = _channel_meta(records, n, group, slice_of(K, i), K, ASM)
                own = own + ((vectors[n] * scale[:, :, None]).to(tl.float16),)
                if slice_of(K, i).terms == 2:
                    # Summed by a product, so that scale and minimum are wanted in one arrangement and loaded once.
                    ones = tl.full([T.warps, T.rows, minimum.shape[1]], 1.0, tl.float16)
                    offset = tl.dot(ones, vectors[n] * minimum.to(tl.float16)[:, :, None], offset)
        if slice_of(K, i).range_offset >= 0:
            low, step = load_range(records, group, group, slice_of(K, i), False, ASM)
            total += offset * step[:, :, None] + low[:, :, None] * sums[i]
        else:
            total += offset
    return own, total


@triton.jit
def _channel_meta(records, n: tl.constexpr, group: tl.constexpr, S: tl.constexpr, K: tl.constexpr, ASM: tl.constexpr):
    """Scale and minimum [W, C] of operand n's channels; a minimum relative to others as the byte that is stored."""
    index = group * S.head_dim + local_channels(chunk_at(K, n), block_at(K, n), S)[None, :]
    if S.range_offset >= 0:
        return load_pair(records, index, index, S, False, ASM)
    else:
        return load_meta(records, index, 0, index, S, False, ASM)


@triton.jit
def _less_biases(offset, own, b: tl.constexpr, K: tl.constexpr, T: tl.constexpr):
    """The offset minus the bias sums of the fields that block b's tokens lie in, [W, R, H]."""
    for n in tl.static_range(operands(K)):
        if slice_at(K, n).kind == "affine":
            bias = tl.full([T.warps, T.rows, slice_at(K, n).block], _less_bias(K, T, b, n), tl.float16)
            offset = tl.dot(bias, own[n], offset)
    return offset
