"""What the programs of decode attention begin and end with: queries, an empty state, what hides scores, and the partial
result."""

import triton
import triton.language as tl

from kvq.kernels.decode_attention.tile import add
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
