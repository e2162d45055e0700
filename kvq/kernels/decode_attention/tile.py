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

so no number of a page is scaled or shifted by itself. A correction uses the same rounded fp16 factors as the product
that it corrects, so the bias cancels exactly. Weights are kept times a power of two, chosen so that a weight times the
largest scale nearly fills fp16: small weights and small scales keep their precision.
"""

import triton
import triton.language as tl

from kvq.kernels.device.sections import channels_of, group_of, load_meta, load_norm
from kvq.kernels.device.words import bias_of, exp2, known, unpack


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
    return f // S.chunks * (S.rows // T.stride) + s


@triton.constexpr_function
def _token_group(S, T, b):
    """Token group of block b within its page (axis channel)."""
    return b * T.stride // S.group


@triton.constexpr_function
def _opens_group(S, T, b):
    return b * T.stride % S.group == 0


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
def _token_meta(record, token, g: tl.constexpr, keep, S: tl.constexpr, MASKED: tl.constexpr, ASM: tl.constexpr):
    """Scale and minimum of tokens in channel group g, fp32 [W, R, 1]; axis token, ``S.scaled``."""
    if S.terms == 0:
        scale = load_norm(record, token, keep, S, MASKED)
        minimum = scale
    else:
        scale, minimum = load_meta(record, token * S.groups + g, keep, S, MASKED, ASM)
        scale, minimum = scale.to(tl.float32), minimum.to(tl.float32)
        if S.norm_offset >= 0:
            norm = load_norm(record, token, keep, S, MASKED)
            scale, minimum = scale * norm, minimum * norm
    return scale[:, :, None], minimum[:, :, None]


@triton.jit
def packed_scores(
    record, row, keep, query, book, K: tl.constexpr, T: tl.constexpr, MASKED: tl.constexpr, ASM: tl.constexpr
):
    """Scores of one tile, before the softmax scale: a tuple of T.blocks tensors [W, R, H].

    row     [1 or W, R]: token of row r within its page, for block 0. keep: by block, [W, R], tokens that exist.
    query   (operands [W, C, H] fp16, their sums by channel group, minus their bias sums by part and channel group).
    """
    if K.by_channel:
        return _scores_by_channel(record, row, keep, query[0], book, K, T, MASKED, ASM)
    else:
        operands, sums, negative = query
        raw = ()
        for b in tl.static_range(known(T.blocks)):
            for g in tl.static_range(known(K.groups)):
                start = negative[b // _row_blocks(K, T) * K.groups + g]
                raw = raw + (tl.broadcast_to(start, [T.warps, T.rows, start.shape[2]]),)
        for s in tl.static_range(_row_blocks(K, T)):
            for c in tl.static_range(known(K.blocks)):
                planes = _load_planes(
                    record, row + s * T.stride, c * K.block, keep[s], book, K, _reads_masked(K, MASKED), False, ASM
                )
                for f in tl.static_range(known(K.fields)):
                    raw = _dot_into(
                        raw,
                        _block_of(K, T, f, s) * K.groups + group_of(K, f % K.chunks, c),
                        planes[f],
                        operands[f % K.chunks * K.blocks + c],
                    )
        if not K.scaled:
            return raw
        scores = ()
        for b in tl.static_range(known(T.blocks)):
            scores = scores + (_scaled_scores(record, row, keep[b], raw, sums, b, K, T, MASKED, ASM),)
        return scores


@triton.jit
def _scaled_scores(
    record,
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
    scale, minimum = _token_meta(record, row + b * T.stride, 0, keep, K, MASKED, ASM)
    total = raw[b * K.groups] * scale
    if K.terms == 2:
        total += minimum * sums[0]
    for g in tl.static_range(1, known(K.groups)):
        scale, minimum = _token_meta(record, row + b * T.stride, g, keep, K, MASKED, ASM)
        total += raw[b * K.groups + g] * scale
        if K.terms == 2:
            total += minimum * sums[g]
    return total


@triton.jit
def _scores_by_channel(
    record, row, keep, operands, book, K: tl.constexpr, T: tl.constexpr, MASKED: tl.constexpr, ASM: tl.constexpr
):
    """Axis channel: every token group of the tile has its own scaled query."""
    scaled = ()
    start = ()
    for b in tl.static_range(known(T.blocks)):
        if _opens_group(K, T, b):
            own, offset = _scaled_query(record, operands, _token_group(K, T, b), K, T, ASM)
            scaled = scaled + (own,)
            for part in tl.static_range(known(K.parts)):
                start = start + (_less_biases(offset, own, part, K, T),)
    scores = ()
    for b in tl.static_range(known(T.blocks)):
        scores = scores + (start[_token_group(K, T, b) * K.parts + b // _row_blocks(K, T)],)
    for s in tl.static_range(_row_blocks(K, T)):
        for c in tl.static_range(known(K.blocks)):
            planes = _load_planes(record, row + s * T.stride, c * K.block, keep[s], book, K, False, False, ASM)
            for f in tl.static_range(known(K.fields)):
                own = scaled[_token_group(K, T, _block_of(K, T, f, s))]
                scores = _dot_into(scores, _block_of(K, T, f, s), planes[f], own[f % K.chunks * K.blocks + c])
    if K.norm_offset >= 0:
        lengths = ()
        for b in tl.static_range(known(T.blocks)):
            norm = load_norm(record, row + b * T.stride, keep[b], K, MASKED)
            lengths = lengths + (scores[b] * norm[:, :, None],)
        return lengths
    return scores


@triton.jit
def _scaled_query(record, operands, group: tl.constexpr, K: tl.constexpr, T: tl.constexpr, ASM: tl.constexpr):
    """Query operands times the scales of a token group, and q . minimum in every row, [W, R, H]."""
    own = ()
    ones = tl.full([T.warps, T.rows, K.block], 1.0, tl.float16)
    offset = tl.full([T.warps, T.rows, operands[0].shape[2]], 0.0, tl.float32)
    for chunk in tl.static_range(known(K.chunks)):
        for c in tl.static_range(known(K.blocks)):
            channel = channels_of(chunk, c, K)[None, :]
            scale, minimum = load_meta(record, group * K.head_dim + channel, channel, K, False, ASM)
            q = operands[chunk * K.blocks + c]
            own = own + ((q * scale[:, :, None]).to(tl.float16),)
            if K.terms == 2:
                # Summed by a product, so that scale and minimum are wanted in one arrangement and loaded once.
                offset = tl.dot(ones, q * minimum[:, :, None], offset)
    return own, offset


@triton.jit
def _less_biases(offset, own, part: tl.constexpr, K: tl.constexpr, T: tl.constexpr):
    """The offset minus the bias sums of one part's fields, [W, R, H]."""
    if K.kind == "book":
        return offset
    for chunk in tl.static_range(known(K.chunks)):
        bias = tl.full([T.warps, T.rows, K.block], -bias_of(K, part * K.chunks + chunk), tl.float16)
        for c in tl.static_range(known(K.blocks)):
            offset = tl.dot(bias, own[chunk * K.blocks + c], offset)
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
    record,
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
        return offsets, biases, _values_by_channel(sums, record, row, keep, weights, book, V, T, MASKED, ASM)
    else:
        rounded = ()
        if V.terms == 2:
            offsets = scaled(offsets, shrink)
        if V.kind == "affine":
            biases = scaled(biases, shrink)
        for b in tl.static_range(known(T.blocks)):
            rows = _bias_rows(V, b // _row_blocks(V, T), T)
            for g in tl.static_range(known(V.groups)):
                p = weights[b]
                if V.scaled:
                    scale, minimum = _token_meta(record, row + b * T.stride, g, keep[b], V, MASKED, ASM)
                    if V.terms == 2:
                        offsets = add(offsets, g, _token_sum(p * minimum))
                    p = p * scale
                if V.kind == "affine":
                    biases = _dot_into(biases, g, rows, p.to(tl.float16))
                rounded = rounded + (p.to(tl.float16),)
        for s in tl.static_range(_row_blocks(V, T)):
            for c in tl.static_range(known(V.blocks)):
                planes = _load_planes(
                    record, row + s * T.stride, c * V.block, keep[s], book, V, _reads_masked(V, MASKED), True, ASM
                )
                for f in tl.static_range(known(V.fields)):
                    p = rounded[_block_of(V, T, f, s) * V.groups + group_of(V, f % V.chunks, c)]
                    sums = _dot_into(sums, f % V.chunks * V.blocks + c, planes[f], p)
        return offsets, biases, sums


@triton.jit
def _bias_rows(V: tl.constexpr, part: tl.constexpr, T: tl.constexpr):
    """What the rounded weights are multiplied by for the bias sums, [W, 16, R].

    Ones where a field's bias depends on its chunk alone; else row j holds the bias of chunk j in this part.
    """
    if V.parts == 1:
        return tl.full([T.warps, 16, T.rows], 1.0, tl.float16)
    else:
        row = tl.arange(0, 16)[None, :, None]
        rows = tl.full([T.warps, 16, T.rows], bias_of(V, part * V.chunks), tl.float16)
        for chunk in tl.static_range(1, known(V.chunks)):
            rows = tl.where(row == chunk, bias_of(V, part * V.chunks + chunk), rows).to(tl.float16)
        return rows


@triton.jit
def _values_by_channel(
    sums, record, row, keep, weights, book, V: tl.constexpr, T: tl.constexpr, MASKED: tl.constexpr, ASM: tl.constexpr
):
    """Axis channel: a block's product is finished with its own scales before it is added."""
    rounded = ()
    totals = ()
    for b in tl.static_range(known(T.blocks)):
        p = weights[b]
        if V.norm_offset >= 0:
            p = p * load_norm(record, row + b * T.stride, keep[b], V, MASKED)[:, :, None]
        p = p.to(tl.float16)
        rounded = rounded + (p,)
        totals = totals + (tl.sum(p.to(tl.float32), 1, keep_dims=True),)
    for s in tl.static_range(_row_blocks(V, T)):
        for c in tl.static_range(known(V.blocks)):
            planes = _load_planes(record, row + s * T.stride, c * V.block, keep[s], book, V, False, True, ASM)
            for f in tl.static_range(known(V.fields)):
                own = _scaled_product(record, planes[f], rounded, totals, _block_of(V, T, f, s), f, c, V, T, ASM)
                sums = add(sums, f % V.chunks * V.blocks + c, own)
    return sums


@triton.jit
def _scaled_product(
    record,
    plane,
    rounded,
    totals,
    b: tl.constexpr,
    f: tl.constexpr,
    c: tl.constexpr,
    V: tl.constexpr,
    T: tl.constexpr,
    ASM: tl.constexpr,
):
    """Weighted sum of one plane's values, [W, C, H], axis channel."""
    channel = channels_of(f % V.chunks, c, V)[None, :]
    index = _token_group(V, T, b) * V.head_dim + channel
    scale, minimum = load_meta(record, index, channel, V, False, ASM)
    start = tl.broadcast_to(totals[b] * -bias_of(V, f), [T.warps, V.block, totals[b].shape[2]])
    product = tl.dot(plane, rounded[b], start) * scale.to(tl.float32)[:, :, None]
    if V.terms == 2:
        product += totals[b] * minimum.to(tl.float32)[:, :, None]
    return product
