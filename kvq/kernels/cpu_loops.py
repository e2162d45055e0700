"""The loops behind ``kvq/kernels/cpu.py``. Imported on first use, since it needs numba and compiles.

Numbers arrive in small integer arrays so that one compilation per dtype serves every layout; their order is that of
``_side_numbers`` and of ``decode_row``'s call.
"""

import numpy as np
from numba import njit, types
from numba.extending import overload

from kvq.kernels.lanes import (
    LANES,
    as_ints,
    as_reals,
    bits_as_floats,
    either,
    fma,
    largest,
    load_bytes,
    load_even_words,
    load_odd_words,
    load_reals,
    load_words,
    mask,
    plus,
    rounded,
    shift_left,
    shift_right,
    splat,
    store_reals,
    times,
    total,
    widened,
)  # fmt: skip

# Stands for minus infinity, which compiled arithmetic may not assume to be handled.
LOWEST = -1e30
SETTINGS = {"cache": True, "fastmath": True, "nogil": True, "error_model": "numpy"}


@njit(**SETTINGS)
def _codes(at, bits, width, row, first, field):
    """Codes of sixteen neighbouring channels in one field of a row of words; the layout is kvq/kernels/spec.py."""
    if bits == 3:
        start = at + 2 * (3 * row * width + first)
        if field < 15:
            return mask(shift_right(load_words(start + 2 * width * (field // 5)), 3 * (field % 5)), 7)
        low = shift_right(load_words(start), 15)
        middle = mask(shift_right(load_words(start + 2 * width), 14), 2)
        return either(either(low, middle), mask(shift_right(load_words(start + 4 * width), 13), 4))
    words = load_words(at + 2 * (row * width + first))
    if bits == 4:
        if field == 3:
            return either(shift_right(words, 14), shift_left(mask(words, 3), 2))
        return mask(shift_right(words, 4 * field + 2), 15)
    return mask(shift_right(words, bits * field), (1 << bits) - 1)


@njit(**SETTINGS)
def _by_channel(at, side, steps, minima, out):
    """Words to numbers, out [tokens, D] = code * step + minimum; steps and minima [token groups, D]."""
    bits, group, rows, chunks, width = side[0], side[2], side[3], side[4], side[5]
    tokens, D = out.shape
    size, one = out.itemsize, out[0, 0]
    start, edge, target = 0, group, out.ctypes.data
    for part in range(tokens // rows):
        for row in range(rows):
            if part * rows + row == edge:
                start, edge = start + D * size, edge + group
            offset = start
            for field in range(part * chunks, (part + 1) * chunks):
                for first in range(0, width, LANES):
                    code = as_reals(_codes(at, bits, width, row, first, field), one)
                    step = load_reals(steps.ctypes.data + offset, one)
                    store_reals(target, fma(code, step, load_reals(minima.ctypes.data + offset, one)))
                    offset, target = offset + LANES * size, target + LANES * size


@njit(**SETTINGS)
def _by_token(at, side, steps, minima, out):
    """The same with steps and minima [tokens, channel groups]."""
    bits, group, rows, chunks, width = side[0], side[2], side[3], side[4], side[5]
    size, one, own, target = out.itemsize, out[0, 0], 0, out.ctypes.data
    for part in range(out.shape[0] // rows):
        for row in range(rows):
            step, minimum, left = splat(steps[own]), splat(minima[own]), group
            for field in range(part * chunks, (part + 1) * chunks):
                for first in range(0, width, LANES):
                    if left == 0:
                        own += 1
                        step, minimum, left = splat(steps[own]), splat(minima[own]), group
                    code = as_reals(_codes(at, bits, width, row, first, field), one)
                    store_reals(target, fma(code, step, minimum))
                    left, target = left - LANES, target + LANES * size
            own += 1


@njit(**SETTINGS)
def _halves(at, count, steps, minima):
    """fp16 pairs (scale, minimum) as two arrays: exponent and fraction moved into place, the offset multiplied away.

    Sixteen at a time: reads to the end of 64 bytes, which records are padded beyond.
    """
    offset = splat(np.float32(2.0**112))
    for i in range(0, count, LANES):
        for odd, target in ((False, steps), (True, minima)):
            half = load_odd_words(at + 4 * i) if odd else load_even_words(at + 4 * i)
            bits = either(shift_left(mask(half, 0x7FFF), 13), shift_left(mask(half, 0x8000), 16))
            number = widened(times(bits_as_floats(bits), offset), steps[0])
            store_reals(target.ctypes.data + i * target.itemsize, number)


@njit(**SETTINGS)
def _bytes(at, scale, out):
    """E4M3 bytes to numbers, out [tokens, D] = byte * scale. The code of NaN is never stored."""
    offset, factor = splat(np.float32(2.0**120)), splat(scale)
    for i in range(0, out.size, LANES):
        byte = load_bytes(at + i)
        bits = either(shift_left(mask(byte, 0x7F), 20), shift_left(mask(byte, 0x80), 24))
        number = widened(times(bits_as_floats(bits), offset), scale)
        store_reals(out.ctypes.data + i * out.itemsize, times(number, factor))


@njit(**SETTINGS)
def _numbers(words_at, meta_at, side, scale, steps, minima, out):
    """One side of a page as numbers, out [page_tokens, head_dim]."""
    tokens, D = out.shape
    if side[0] == 0:
        _bytes(words_at, scale, out)
    elif side[1] == 1:
        _halves(meta_at, tokens // side[2] * D, steps, minima)
        _by_channel(words_at, side, steps, minima, out)
    else:
        _halves(meta_at, tokens * side[6], steps, minima)
        _by_token(words_at, side, steps, minima, out)


@njit(**SETTINGS)
def _products(q, keys, count, scores):
    """scores [M, t] = q [M, D] . keys [t, D]; four tokens at a time share the loads of q."""
    M, D = q.shape
    one, row = q[0, 0], D * q.itemsize
    zero, whole = splat(q.dtype.type(0)), count // 4 * 4
    for t in range(0, whole, 4):
        k0 = keys.ctypes.data + t * row
        for m in range(M):
            own = q.ctypes.data + m * row
            s0, s1, s2, s3 = zero, zero, zero, zero
            for d in range(0, row, LANES * q.itemsize):
                part = load_reals(own + d, one)
                s0 = fma(part, load_reals(k0 + d, one), s0)
                s1 = fma(part, load_reals(k0 + row + d, one), s1)
                s2 = fma(part, load_reals(k0 + 2 * row + d, one), s2)
                s3 = fma(part, load_reals(k0 + 3 * row + d, one), s3)
            scores[m, t], scores[m, t + 1], scores[m, t + 2] = total(s0), total(s1), total(s2)
            scores[m, t + 3] = total(s3)
    for t in range(whole, count):
        for m in range(M):
            dot = zero
            for d in range(0, row, LANES * q.itemsize):
                dot = fma(
                    load_reals(q.ctypes.data + m * row + d, one), load_reals(keys.ctypes.data + t * row + d, one), dot
                )
            scores[m, t] = total(dot)


@njit(**SETTINGS)
def _add_weighted(weights, values, count, acc):
    """acc [M, D] += weights [M, t] . values [t, D]; four tokens at a time share the load and store of acc."""
    M, D = acc.shape
    one, row = acc[0, 0], D * acc.itemsize
    whole = count // 4 * 4
    for t in range(0, whole, 4):
        v0 = values.ctypes.data + t * row
        for m in range(M):
            w0, w1 = splat(weights[m, t]), splat(weights[m, t + 1])
            w2, w3 = splat(weights[m, t + 2]), splat(weights[m, t + 3])
            own = acc.ctypes.data + m * row
            for d in range(0, row, LANES * acc.itemsize):
                add = fma(w0, load_reals(v0 + d, one), load_reals(own + d, one))
                add = fma(w1, load_reals(v0 + row + d, one), add)
                add = fma(w2, load_reals(v0 + 2 * row + d, one), add)
                store_reals(own + d, fma(w3, load_reals(v0 + 3 * row + d, one), add))
    for t in range(whole, count):
        for m in range(M):
            for d in range(D):
                acc[m, d] += weights[m, t] * values[t, d]


def _exponentials(scores, count, highest):
    """scores [t] become exp(scores - highest); returns their sum."""
    raise NotImplementedError("compiled only")


@overload(_exponentials, jit_options=SETTINGS)
def _choose_exponentials(scores, count, highest):
    def exact(scores, count, highest):
        new = highest - highest
        for t in range(count):
            scores[t] = np.exp(scores[t] - highest)
            new += scores[t]
        return new

    def single(scores, count, highest):
        """2^n times the series of e^r, where r is at most ln(2)/2: eight terms reach float32."""
        one, new = scores[0], splat(np.float32(0))
        up, low = splat(np.float32(1.4426950408889634)), splat(np.float32(-88.0))
        ln2, rest = splat(np.float32(-0.693359375)), splat(np.float32(2.12194440e-4))
        for t in range(count, (count + LANES - 1) // LANES * LANES):
            scores[t] = LOWEST
        for t in range(0, count, LANES):
            at = scores.ctypes.data + 4 * t
            x = largest(fma(splat(np.float32(-1)), splat(highest), load_reals(at, one)), low)
            n = rounded(times(x, up))
            r = fma(n, rest, fma(n, ln2, x))
            series = splat(np.float32(1 / 5040))
            for term in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
                series = fma(series, r, splat(np.float32(term)))
            weight = times(series, bits_as_floats(shift_left(plus(as_ints(n), 127), 23)))
            store_reals(at, weight)
            new = fma(weight, splat(np.float32(1)), new)
        return total(new)

    return single if scores.dtype == types.float32 else exact


@njit(**SETTINGS)
def _take(q, keys, values, count, softcap, bias, first, scores, top, sums, acc):
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
        sums[m] = sums[m] * shrink + _exponentials(scores[m], count, highest)
        for d in range(D):
            acc[m, d] *= shrink
    _add_weighted(scores, values, count, acc)


@njit(**SETTINGS)
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
    first_unit, last_unit, q, addresses, sizes, key, value, numbers, exact_k, exact_v, sink_k, sink_v, bias,
    tops, totals, accs,
):  # fmt: skip
    """Units [first, last) of heads times splits; writes their partial results."""
    M, D = q.shape[1:]
    record, size, packed_k, packed_v, body, splits = sizes[0], sizes[5], sizes[6], sizes[7], sizes[8], sizes[9]
    softcap, S = numbers[2], sink_k.shape[1]
    pages = (body + size - 1) // size
    steps, minima = np.empty(D * size, q.dtype), np.empty(D * size, q.dtype)
    keys, values = np.empty((size, D), q.dtype), np.empty((size, D), q.dtype)
    scores = np.empty((M, (max(size, S) + LANES - 1) // LANES * LANES), q.dtype)
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
                page = addresses[p] + head * record
                if from_k:
                    _numbers(page + sizes[1], page + sizes[3], key, numbers[0], steps, minima, keys)
                if from_v:
                    _numbers(page + sizes[2], page + sizes[4], value, numbers[1], steps, minima, values)
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
        strided, real[::1], lines, lines, whole,
    )  # fmt: skip
    return njit(units, **SETTINGS)(_attend_units), _merge
