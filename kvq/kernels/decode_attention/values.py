"""The softmax step of a tile, and the weighted sum of its packed values (``tile.py`` has shapes and algebra)."""

import triton
import triton.language as tl

from kvq.kernels.decode_attention.tile import (
    add,
    block_of,
    dot_into,
    load_planes,
    part_of,
    reads_masked,
    row_blocks,
    scaled,
    token_group,
    token_meta,
)
from kvq.kernels.device.sections import (
    first_operand,
    group_of,
    load_meta,
    load_norm,
    local_channels,
    slice_of,
    slices,
)
from kvq.kernels.device.words import bias_of, exp2, known, middle_of


@triton.jit
def _token_sum(x):
    """Sum x [W, R, H] over eight rows at a time, [W, 8, H]: additions within a thread, the rest is left for the end."""
    if x.shape[1] > 8:
        return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // 8, 8, x.shape[2]]), 1)
    else:
        return x


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
            rows = _bias_rows(V, part_of(V, T, b), T)
            for g in tl.static_range(known(V.groups)):
                p = weights[b]
                if V.scaled:
                    scale, minimum = token_meta(records, row + b * T.stride, g, keep[b], V, MASKED, ASM)
                    if V.terms == 2:
                        offsets = add(offsets, g, _token_sum(p * minimum))
                    p = p * scale
                if V.kind == "affine":
                    biases = dot_into(biases, g, rows, p.to(tl.float16))
                rounded = rounded + (p.to(tl.float16),)
        for s in tl.static_range(row_blocks(V, T)):
            for c in tl.static_range(known(V.blocks)):
                planes = load_planes(
                    records[0], row + s * T.stride, c * V.block, keep[s], book, V, reads_masked(V, MASKED), True, ASM
                )
                for f in tl.static_range(known(V.fields)):
                    p = rounded[block_of(V, T, f, s) * V.groups + group_of(V, f % V.chunks, c)]
                    sums = dot_into(sums, f % V.chunks * V.blocks + c, planes[f], p)
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
    for s in tl.static_range(row_blocks(V, T)):
        for c in tl.static_range(known(V.blocks)):
            planes = load_planes(records[0], row + s * T.stride, c * V.block, row, book, V, False, True, ASM)
            for f in tl.static_range(known(V.fields)):
                own = _scaled_product(
                    records,
                    planes[f],
                    keep[block_of(V, T, f, s)],
                    rounded[block_of(V, T, f, s)],
                    totals[block_of(V, T, f, s)],
                    block_of(V, T, f, s),
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
    index = token_group(V, T, b) * V.head_dim + local_channels(f % V.chunks, c, V)[None, :]
    # The numbers of a group that has not begun may be anything.
    begun = tl.max(keep.to(tl.int32), 1, keep_dims=True) > 0 if MASKED else keep
    scale, minimum = load_meta(records, index, token_group(V, T, b), begun, V, MASKED, ASM)
    start = tl.broadcast_to(total * -bias_of(V, f), [T.warps, V.block, total.shape[2]])
    product = tl.dot(plane, rounded, start) * scale.to(tl.float32)[:, :, None]
    if V.terms == 2:
        product += total * minimum.to(tl.float32)[:, :, None]
    return product
