"""The loops behind ``kvq/kernels/cpu.py``. Imported on first use, since it needs numba and compiles.

Numbers arrive in small integer arrays so that one compilation per dtype serves every layout; their order is that of
``_side_numbers`` and of ``decode_row``'s call.
"""

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic

# Stands for minus infinity, which compiled arithmetic may not assume to be handled.
LOWEST = -1e30


@intrinsic
def _pointer(typingctx, address):
    """An integer as a pointer: pages lie in separate allocations."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


@njit(cache=True, fastmath=True, nogil=True)
def _planes(words, side, planes):
    """uint16 words of a page to fields: planes [fields, rows * width] int32; the layout is kvq/kernels/spec.py.

    The loops run over all words of a page at once: compilers vectorise long loops well and short ones badly. Nowhere do
    inner loops take slices: numba counts references to each.
    """
    bits, count = side[0], side[3] * side[5]
    if bits == 3:
        _planes_of_three(words, side, planes)
        return
    fields, mask = 16 // bits, (1 << bits) - 1
    for f in range(fields):
        out, shift = planes[f], bits * f + (2 if bits == 4 else 0)
        if bits == 4 and f == 3:
            for i in range(count):
                out[i] = np.int32((words[i] >> 14) | ((words[i] & 3) << 2))
        else:
            for i in range(count):
                out[i] = np.int32((words[i] >> shift) & mask)


@njit(cache=True, fastmath=True, nogil=True)
def _planes_of_three(words, side, planes):
    rows, width = side[3], side[5]
    count = rows * width
    parts = np.empty((3, count), np.uint16)
    for r in range(rows):
        for c in range(3):
            for i in range(width):
                parts[c, r * width + i] = words[(3 * r + c) * width + i]
    for f in range(15):
        out, own, shift = planes[f], parts[f // 5], 3 * (f % 5)
        for i in range(count):
            out[i] = np.int32((own[i] >> shift) & 7)
    out, low, middle, high = planes[15], parts[0], parts[1], parts[2]
    for i in range(count):
        out[i] = np.int32((low[i] >> 15) | ((middle[i] >> 14) & 2) | ((high[i] >> 13) & 4))


@njit(cache=True, fastmath=True, nogil=True)
def _by_channel(planes, rows, chunks, width, steps, minima, group, out):
    """Planes to numbers, out [tokens, D] = code * step + minimum; steps and minima [token groups, D]."""
    tokens, D = out.shape
    for part in range(tokens // rows):
        for r in range(rows):
            t = part * rows + r
            for c in range(chunks):
                for i in range(width):
                    out[t, c * width + i] = planes[part * chunks + c, r * width + i]
            own = t // group
            for d in range(D):
                out[t, d] = out[t, d] * steps[own, d] + minima[own, d]


@njit(cache=True, fastmath=True, nogil=True)
def _by_token(planes, rows, chunks, width, steps, minima, wide, out):
    """The same with steps and minima [tokens, channel groups], groups of ``wide`` channels that hold whole chunks."""
    real = out.dtype.type
    for part in range(out.shape[0] // rows):
        for r in range(rows):
            t = part * rows + r
            for c in range(chunks):
                step, minimum = steps[t, c * width // wide], minima[t, c * width // wide]
                for i in range(width):
                    out[t, c * width + i] = real(planes[part * chunks + c, r * width + i]) * step + minimum


@njit(cache=True, fastmath=True, nogil=True)
def _by_narrow_token(planes, rows, chunks, width, steps, minima, wide, out):
    """The same with groups that lie within a chunk."""
    real = out.dtype.type
    for part in range(out.shape[0] // rows):
        for r in range(rows):
            t = part * rows + r
            for c in range(chunks):
                for first in range(0, width, wide):
                    group = (c * width + first) // wide
                    step, minimum = steps[t, group], minima[t, group]
                    for i in range(first, first + wide):
                        out[t, c * width + i] = real(planes[part * chunks + c, r * width + i]) * step + minimum


@njit(cache=True, fastmath=True, nogil=True)
def _halves(raw, bits32, steps, minima):
    """fp16 pairs (scale, minimum) as two arrays: exponent and fraction moved into place, the offset multiplied away."""
    for i in range(len(raw)):
        half = np.int32(raw[i])
        bits32[i] = np.int32(((half & 0x7FFF) << 13) | ((half & 0x8000) << 16))
    floats, real = bits32.view(np.float32), steps.dtype.type
    flat_steps, flat_minima = steps.reshape(-1), minima.reshape(-1)
    for i in range(len(raw) // 2):
        flat_steps[i] = real(floats[2 * i] * np.float32(5.192296858534828e33))
        flat_minima[i] = real(floats[2 * i + 1] * np.float32(5.192296858534828e33))


@njit(cache=True, fastmath=True, nogil=True)
def _numbers(page, words_at, meta_at, side, scale, table, planes, bits32, steps, minima, out):
    """One side of a page as numbers, out [page_tokens, head_dim]."""
    tokens, D = out.shape
    if side[0] == 0:
        for t in range(tokens):
            for d in range(D):
                out[t, d] = table[page[words_at + t * D + d]] * scale
        return
    group = side[2] if side[1] == 1 else 1
    pairs = (tokens // group, D if side[1] == 1 else side[6])
    _planes(page[words_at:].view(np.uint16), side, planes)
    count = pairs[0] * pairs[1]
    raw = page[meta_at : meta_at + 4 * count].view(np.uint16)
    own_steps, own_minima = steps[:count].reshape(pairs), minima[:count].reshape(pairs)
    _halves(raw, bits32, own_steps, own_minima)
    if side[1] == 1:
        _by_channel(planes, side[3], side[4], side[5], own_steps, own_minima, group, out)
    elif side[2] >= side[5]:
        _by_token(planes, side[3], side[4], side[5], own_steps, own_minima, side[2], out)
    else:
        _by_narrow_token(planes, side[3], side[4], side[5], own_steps, own_minima, side[2], out)


@njit(cache=True, fastmath=True, nogil=True)
def _products(q, keys, count, scores):
    """scores [M, t] = q [M, D] . keys [t, D]; four tokens at a time share the loads of q."""
    M, D = q.shape
    zero, whole = q.dtype.type(0), count // 4 * 4
    for t in range(0, whole, 4):
        for m in range(M):
            s0, s1, s2, s3 = zero, zero, zero, zero
            for d in range(D):
                s0 += q[m, d] * keys[t, d]
                s1 += q[m, d] * keys[t + 1, d]
                s2 += q[m, d] * keys[t + 2, d]
                s3 += q[m, d] * keys[t + 3, d]
            scores[m, t], scores[m, t + 1], scores[m, t + 2], scores[m, t + 3] = s0, s1, s2, s3
    for t in range(whole, count):
        for m in range(M):
            dot = zero
            for d in range(D):
                dot += q[m, d] * keys[t, d]
            scores[m, t] = dot


@njit(cache=True, fastmath=True, nogil=True)
def _add_weighted(weights, values, count, acc):
    """acc [M, D] += weights [M, t] . values [t, D]; four tokens at a time share the load and store of acc."""
    M, D = acc.shape
    whole = count // 4 * 4
    for t in range(0, whole, 4):
        for m in range(M):
            w0, w1, w2, w3 = weights[m, t], weights[m, t + 1], weights[m, t + 2], weights[m, t + 3]
            for d in range(D):
                acc[m, d] += w0 * values[t, d] + w1 * values[t + 1, d] + w2 * values[t + 2, d] + w3 * values[t + 3, d]
    for t in range(whole, count):
        for m in range(M):
            for d in range(D):
                acc[m, d] += weights[m, t] * values[t, d]


@njit(cache=True, fastmath=True, nogil=True)
def _take(q, keys, values, count, softcap, bias, first, scores, top, total, acc):
    """Let queries [M, D] see ``count`` more tokens: update the running maximum, sum and weighted sum."""
    M, D = q.shape
    _products(q, keys, count, scores)
    for m in range(M):
        if softcap > 0:
            for t in range(count):
                scores[m, t] = softcap * np.tanh(scores[m, t] / softcap)
        if len(bias):
            for t in range(count):
                scores[m, t] = max(scores[m, t] + bias[first + t], LOWEST)
        highest = top[m]
        for t in range(count):
            highest = max(highest, scores[m, t])
        shrink = np.exp(top[m] - highest)
        top[m] = highest
        new = q.dtype.type(0)
        for t in range(count):
            scores[m, t] = np.exp(scores[m, t] - highest)
            new += scores[m, t]
        total[m] = total[m] * shrink + new
        for d in range(D):
            acc[m, d] *= shrink
    _add_weighted(scores, values, count, acc)


@njit(cache=True, fastmath=True, nogil=True)
def _merge(tops, totals, accs, learned, out):
    """Partial results [K, splits, M, ...] to out [K, M, D]; learned [K, M] is one more logit."""
    K, splits, M = tops.shape
    for head in range(K):
        for m in range(M):
            highest = learned[head, m]
            for split in range(splits):
                highest = max(highest, tops[head, split, m])
            total = np.exp(learned[head, m] - highest)
            row = out[head, m]
            row[:] = 0
            for split in range(splits):
                share = np.exp(tops[head, split, m] - highest)
                total += totals[head, split, m] * share
                for d in range(len(row)):
                    row[d] += accs[head, split, m, d] * share
            for d in range(len(row)):
                row[d] /= total


def _attend_units(
    first_unit, last_unit, q, addresses, sizes, key, value, numbers, exact_k, exact_v, sink_k, sink_v, bias, table,
    tops, totals, accs,
):  # fmt: skip
    """Units [first, last) of heads times splits; writes their partial results."""
    M, D = q.shape[1:]
    record, size, packed_k, packed_v, body, splits = sizes[0], sizes[5], sizes[6], sizes[7], sizes[8], sizes[9]
    softcap, S = numbers[2], sink_k.shape[1]
    pages = (body + size - 1) // size
    planes, bits32 = np.empty((16, D * size // 2), np.int32), np.empty(2 * D * size, np.int32)
    steps, minima = np.empty(D * size, q.dtype), np.empty(D * size, q.dtype)
    keys, values = np.empty((size, D), q.dtype), np.empty((size, D), q.dtype)
    scores = np.empty((M, max(size, S)), q.dtype)
    for unit in range(first_unit, last_unit):
        head, split = unit // splits, unit % splits
        top, total, acc = tops[head, split], totals[head, split], accs[head, split]
        top[:], total[:], acc[:] = LOWEST, 0, 0
        if split == 0 and S:
            _take(q[head], sink_k[head].copy(), sink_v[head].copy(), S, softcap, bias, 0, scores, top, total, acc)
        for p in range(pages * split // splits, pages * (split + 1) // splits):
            first, count = p * size, min(size, body - p * size)
            from_k, from_v = min(count, max(0, packed_k - first)), min(count, max(0, packed_v - first))
            if from_k or from_v:
                page = carray(_pointer(addresses[p] + head * record), (record,), np.uint8)
                if from_k:
                    _numbers(page, sizes[1], sizes[3], key, numbers[0], table, planes, bits32, steps, minima, keys)
                if from_v:
                    _numbers(page, sizes[2], sizes[4], value, numbers[1], table, planes, bits32, steps, minima, values)
            for t in range(from_k, count):
                keys[t] = exact_k[head, exact_k.shape[1] - body + first + t]
            for t in range(from_v, count):
                values[t] = exact_v[head, exact_v.shape[1] - body + first + t]
            _take(q[head], keys, values, count, softcap, bias, S + first, scores, top, total, acc)


def compiled(real):
    """(attend_units, merge) for float32 or float64 numbers (a numba type); compiled once and kept on disk."""
    integers, strided = types.int64[::1], real[:, :, :]
    lines, whole = real[:, :, ::1], real[:, :, :, ::1]
    units = types.void(
        types.int64, types.int64, lines, integers, integers, integers, integers, real[::1], strided, strided, strided,
        strided, real[::1], real[::1], lines, lines, whole,
    )  # fmt: skip
    settings = {"cache": True, "fastmath": True, "nogil": True, "error_model": "numpy"}
    return njit(units, **settings)(_attend_units), _merge
