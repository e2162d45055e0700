"""One tile of decode attention: scores from packed keys, the softmax step, and the weighted sum of packed values.

Every tensor leads with the warps of the program: Triton gives each warp one entry of a batched product, so a warp has
its own tokens and its own softmax state, and the loop needs no exchange between warps. Tokens are the M side of the
products, heads (query columns) the N side. Shapes: W warps, R tokens of a block, C containers, H query columns.

The algebra (c code, P its field's bias, s scale, z minimum, p weights):

    axis token     score_t = s_t (sum_c q_c (c + P) - sum_c q_c P) + z_t sum_c q_c
                   out_c   = sum_t (p_t s_t)(c + P) - P sum_t (p_t s_t) + sum_t p_t z_t
    axis channel   score_t = sum_c (q_c s_c)(c + P) - sum_c (q_c s_c) P + sum_c (q_c z_c)
                   out_c   = s_c (sum_t p_t (c + P) - P sum_t p_t) + z_c sum_t p_t

    (symmetric codes have no z and half their range added to P; levels of a book have no P)

    (keys in a frame: every block of the frame has a query of its own, and a bias that is added to the score)

so no number of a page is scaled or shifted by itself. A correction uses the same rounded fp16 factors as the product
that it corrects, so the bias cancels exactly. Weights are kept times a power of two, chosen so that a weight times the
largest scale nearly fills fp16: small weights and small scales keep their precision.
"""

import triton
import triton.language as tl

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
from kvq.kernels.device.words import bias_of, exp2, known, middle_of, unpack


@triton.jit
def add(values, i: tl.constexpr, value):
    """The tuple with ``value`` added to entry i."""
    return values[:i] + (values[i] + value,) + values[i + 1 :]


@triton.jit
def scaled(values, factor):
    """The tuple with every entry multiplied."""
    scaled = ()
    for i in tl.static_range(known(len(values))):
        scaled = scaled + (values[i] * factor,)
    return scaled


@triton.jit
def _dot_into(values, i: tl.constexpr, a, b):
    """The tuple with the product a @ b added to entry i."""
    return values[:i] + (tl.dot(a, b, values[i]),) + values[i + 1 :]


@triton.constexpr_function
def _row_blocks(S, T):
    """Blocks of tokens in a row of containers' share of the tile."""
    return S.rows // T.stride


@triton.constexpr_function
def _block_of(S, T, f, s):
    """Block of the tile that field f of row block s belongs to."""
    unit, row = divmod(s * T.stride, S.unit_rows)
    return (unit * S.unit + f // S.chunks * S.unit_rows + row) // T.stride


@triton.constexpr_function
def _part_of(S, T, b):
    """Part of a row of containers that block b lies in."""
    return b * T.stride % S.unit // S.unit_rows


@triton.constexpr_function
def _token_group(S, T, b):
    """Token group of block b within its page (axis channel)."""
    return b * T.stride // S.group


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


@triton.constexpr_function
def _reads_masked(S, masked):
    """Whether words of tokens that do not exist must not be read: numbers may be NaN, codes cannot."""
    return masked and S.kind in ("e4m3", "dense")


@triton.jit
def _token_sum(x):
    """Sum x [W, R, H] over eight rows at a time, [W, 8, H]: additions within a thread, the rest is left for the end."""
    if x.shape[1] > 8:
        return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // 8, 8, x.shape[2]]), 1)
    else:
        return x


@triton.jit
def _load_planes(
    record,
    row,
    first: tl.constexpr,
    keep,
    book,
    S: tl.constexpr,
    MASKED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ASM: tl.constexpr,
):
    """Unpack the containers [first, first + S.block) of rows: planes [W, R, C], or [W, C, R] if TRANSPOSED.

    record: pointers [W, 1 or R] to the records. row [1 or W, R]. keep [W, R]: rows to read, if MASKED.
    """
    if TRANSPOSED:
        # Transposed by address, not by a permutation of loaded words: the operand then comes from shared memory by
        # transposing matrix loads.
        column = (first + tl.arange(0, S.block))[None, :, None]
        record, row, keep = record[:, None, :], row[:, None, :], keep[:, None, :]
    else:
        column = (first + tl.arange(0, S.block))[None, None, :]
        record, row, keep = record[:, :, None], row[:, :, None], keep[:, :, None]
    words = ()
    for w in tl.static_range(known(S.words)):
        at = record.to(tl.pointer_type(tl.int16)) + (S.words_offset // 2 + row * S.row_words + w * S.width + column)
        # Not true of the first dimension: it makes the lanes of a warp run over it before rows, so that a thread meets
        # one page only. The width of a load follows from the dimension of the words alone.
        at = tl.max_contiguous(at, [2, 8, 1] if TRANSPOSED else [2, 1, 8])
        if MASKED:
            word = tl.load(at, mask=keep & (column < S.width), other=0)
        elif S.width % S.block != 0:
            word = tl.load(at, mask=column < S.width, other=0)
        else:
            word = tl.load(at)
        words = words + (word,)
    return unpack(words, book, S, ASM)


@triton.jit
def _token_meta(records, token, g: tl.constexpr, keep, S: tl.constexpr, MASKED: tl.constexpr, ASM: tl.constexpr):
    """Scale and minimum of tokens in channel group g, fp32 [W, R, 1]; axis token, ``S.scaled``."""
    if S.terms == 0:
        scale = load_norm(records, token, keep, S, MASKED)
        minimum = scale
    else:
        scale, minimum = load_meta(records, token * S.groups + g, 0, keep, S, MASKED, ASM)
        scale, minimum = scale.to(tl.float32), minimum.to(tl.float32)
        if S.norm_offset >= 0:
            norm = load_norm(records, token, keep, S, MASKED)
            scale, minimum = scale * norm, minimum * norm
    return scale[:, :, None], minimum[:, :, None]


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
            start = queries[frame_of(K, T, b)][2][_part_of(K, T, b) * K.groups + g]
            raw = raw + (tl.broadcast_to(start, [T.warps, T.rows, start.shape[2]]),)
    for s in tl.static_range(_row_blocks(K, T)):
        for c in tl.static_range(known(K.blocks)):
            planes = _load_planes(
                records[0], row + s * T.stride, c * K.block, keep[s], book, K, _reads_masked(K, MASKED), False, ASM
            )
            for f in tl.static_range(known(K.fields)):
                raw = _dot_into(
                    raw,
                    _block_of(K, T, f, s) * K.groups + group_of(K, f % K.chunks, c),
                    planes[f],
                    queries[frame_of(K, T, _block_of(K, T, f, s))][0][f % K.chunks * K.blocks + c],
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
    scale, minimum = _token_meta(records, row + b * T.stride, 0, keep, K, MASKED, ASM)
    total = raw[b * K.groups] * scale
    if K.terms == 2:
        total += minimum * sums[0]
    for g in tl.static_range(1, known(K.groups)):
        scale, minimum = _token_meta(records, row + b * T.stride, g, keep, K, MASKED, ASM)
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
                sums = _dot_into(sums, _sum_of(K, n), ones, vectors[n])
            if not K.by_channel:
                for part in tl.static_range(known(K.parts)):
                    less = tl.full([T.warps, T.rows, K.block], -_bias_at(K, part, n), tl.float16)
                    negative = _dot_into(negative, part * K.groups + _group_at(K, n), less, vectors[n])
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
            own, minimum = _scaled_query(records, queries[frame_of(K, T, b)], _token_group(K, T, b), K, T, ASM)
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
    for s in tl.static_range(_row_blocks(S, T)):
        for c in tl.static_range(known(S.blocks)):
            planes = _load_planes(records[0], row + s * T.stride, c * S.block, row, book, S, False, False, ASM)
            for f in tl.static_range(known(S.fields)):
                own = scaled[_scaled_of(K, T, _block_of(S, T, f, s))]
                scores = _dot_into(scores, _block_of(S, T, f, s), planes[f], own[first + f % S.chunks * S.blocks + c])
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


@triton.jit
def softmax_step(state, scores, kappa, shift, T: tl.constexpr, ASM: tl.constexpr):
    """Move the running maximum: (new (top, total), factor for what is summed so far [W, 1, H], weights by block).

    kappa: what turns scores, and the maximum, into exponents of 2. Weights come out times 2^shift.
    """
    top, total = state
    new = top
    for b in tl.static_range(known(T.blocks)):
        new = tl.maximum(new, tl.max(scores[b], 1, keep_dims=True))
    shrink = exp2((top - new) * kappa, ASM)
    total = total * shrink
    zero = new * kappa - shift
    weights = ()
    for b in tl.static_range(known(T.blocks)):
        p = exp2(scores[b] * kappa - zero, ASM)
        total += _token_sum(p)
        weights = weights + (p,)
    return (new, total), shrink, weights


@triton.jit
def add_packed_values(
    state,
    records,
    row,
    keep,
    shrink,
    weights,
    book,
    V: tl.constexpr,
    T: tl.constexpr,
    MASKED: tl.constexpr,
    ASM: tl.constexpr,
):
    """Add one tile's weighted values to (offsets, biases, sums).

    offsets  by channel group, [W, 8, H]: sum of weights times minimum.
    biases   by channel group, [W, 16, H]: row j is the bias sum of chunk j (of one, where a row holds one token).
    sums     by operand, [W, C, H]: products with code + bias.
    """
    offsets, biases, sums = state
    sums = scaled(sums, shrink)
    if V.by_channel:
        return offsets, biases, _values_by_channel(sums, records, row, keep, weights, book, V, T, MASKED, ASM)
    else:
        rounded = ()
        if V.terms == 2:
            offsets = scaled(offsets, shrink)
        if V.kind == "affine":
            biases = scaled(biases, shrink)
        for b in tl.static_range(known(T.blocks)):
            rows = _bias_rows(V, _part_of(V, T, b), T)
            for g in tl.static_range(known(V.groups)):
                p = weights[b]
                if V.scaled:
                    scale, minimum = _token_meta(records, row + b * T.stride, g, keep[b], V, MASKED, ASM)
                    if V.terms == 2:
                        offsets = add(offsets, g, _token_sum(p * minimum))
                    p = p * scale
                if V.kind == "affine":
                    biases = _dot_into(biases, g, rows, p.to(tl.float16))
                rounded = rounded + (p.to(tl.float16),)
        for s in tl.static_range(_row_blocks(V, T)):
            for c in tl.static_range(known(V.blocks)):
                planes = _load_planes(
                    records[0], row + s * T.stride, c * V.block, keep[s], book, V, _reads_masked(V, MASKED), True, ASM
                )
                for f in tl.static_range(known(V.fields)):
                    p = rounded[_block_of(V, T, f, s) * V.groups + group_of(V, f % V.chunks, c)]
                    sums = _dot_into(sums, f % V.chunks * V.blocks + c, planes[f], p)
        return offsets, biases, sums


@triton.jit
def _bias_rows(V: tl.constexpr, part: tl.constexpr, T: tl.constexpr):
    """What the rounded weights are multiplied by for the bias sums, [W, 16, R].

    Ones where a field's bias depends on its chunk alone; else row j holds the bias of chunk j in this part, without the
    code's middle, which may be a half and is in row 15.
    """
    if V.parts == 1:
        return tl.full([T.warps, 16, T.rows], 1.0, tl.float16)
    else:
        row = tl.arange(0, 16)[None, :, None]
        rows = tl.full([T.warps, 16, T.rows], middle_of(V), tl.float16)
        for chunk in tl.static_range(known(V.chunks)):
            rows = tl.where(row == chunk, bias_of(V, part * V.chunks + chunk) - middle_of(V), rows).to(tl.float16)
        return rows


@triton.jit
def _values_by_channel(
    sums, records, row, keep, weights, book, V: tl.constexpr, T: tl.constexpr, MASKED: tl.constexpr, ASM: tl.constexpr
):
    """Axis channel: a block's product is finished with its own scales before it is added."""
    rounded = ()
    totals = ()
    for b in tl.static_range(known(T.blocks)):
        p = weights[b]
        if V.norm_offset >= 0:
            p = p * load_norm(records, row + b * T.stride, keep[b], V, MASKED)[:, :, None]
        p = p.to(tl.float16)
        rounded = rounded + (p,)
        totals = totals + (tl.sum(p.to(tl.float32), 1, keep_dims=True),)
    for i in tl.static_range(slices(V)):
        if slice_of(V, i).kind != "none":
            sums = _add_value_slice(
                sums, records, row, keep, rounded, totals, book, first_operand(V, i), slice_of(V, i), T, MASKED, ASM
            )
    return sums


@triton.jit
def _add_value_slice(
    sums,
    records,
    row,
    keep,
    rounded,
    totals,
    book,
    first: tl.constexpr,
    V: tl.constexpr,
    T: tl.constexpr,
    MASKED: tl.constexpr,
    ASM: tl.constexpr,
):
    """Sums with the weighted values of one slice, whose operands begin at ``first``, axis channel."""
    for s in tl.static_range(_row_blocks(V, T)):
        for c in tl.static_range(known(V.blocks)):
            planes = _load_planes(records[0], row + s * T.stride, c * V.block, row, book, V, False, True, ASM)
            for f in tl.static_range(known(V.fields)):
                own = _scaled_product(
                    records,
                    planes[f],
                    keep[_block_of(V, T, f, s)],
                    rounded[_block_of(V, T, f, s)],
                    totals[_block_of(V, T, f, s)],
                    _block_of(V, T, f, s),
                    f,
                    c,
                    V,
                    T,
                    MASKED,
                    ASM,
                )
                sums = add(sums, first + f % V.chunks * V.blocks + c, own)
    return sums


@triton.jit
def _scaled_product(
    records,
    plane,
    keep,
    rounded,
    total,
    b: tl.constexpr,
    f: tl.constexpr,
    c: tl.constexpr,
    V: tl.constexpr,
    T: tl.constexpr,
    MASKED: tl.constexpr,
    ASM: tl.constexpr,
):
    """Weighted sum of one plane's values of block b, [W, C, H], axis channel."""
    index = _token_group(V, T, b) * V.head_dim + local_channels(f % V.chunks, c, V)[None, :]
    # The numbers of a group that has not begun may be anything.
    begun = tl.max(keep.to(tl.int32), 1, keep_dims=True) > 0 if MASKED else keep
    scale, minimum = load_meta(records, index, _token_group(V, T, b), begun, V, MASKED, ASM)
    start = tl.broadcast_to(total * -bias_of(V, f), [T.warps, V.block, total.shape[2]])
    product = tl.dot(plane, rounded, start) * scale.to(tl.float32)[:, :, None]
    if V.terms == 2:
        product += total * minimum.to(tl.float32)[:, :, None]
    return product
