"""The loops behind ``kvq/kernels/cpu.py``. Imported on first use, since it needs numba and compiles.

Numbers arrive in small integer arrays so that one compilation per dtype serves every layout; their order is that of
``_side_numbers`` and of ``decode_row``'s call.
"""

import numpy as np
from numba import carray, cfunc, njit, types
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
    next_unit,
    plus,
    pointer_to,
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
# Where a job's numbers lie. Sides are in the order of ``_side_numbers``; exact tokens and sinks are (address, bytes
# from head to head, bytes from token to token) of keys and then of values.
COUNTER, SPLITS, HEADS, QUERIES, HEAD_DIM, RECORD, PAGE_TOKENS, BODY, SINKS, Q, ADDRESSES = range(11)
OFFSETS, PACKED, EXACT, SINK, BIAS, NUMBERS, PARTIAL, SIDE, JOB = 11, 15, 17, 23, 29, 31, 32, 35, 49
SETTINGS = {"cache": True, "fastmath": True, "nogil": True, "error_model": "numpy"}


@njit(**SETTINGS)
def _codes(at, bits, width, row, first, field):
    """Codes of sixteen neighbouring channels in one field of a row of words; the layout is kvq/pages/layout.py."""
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


@njit(**SETTINGS)
def _copy(source, stride, first, last, target):
    """Tokens [first, last) of exact numbers at ``source``, ``stride`` bytes apart, to the rows of target."""
    one, row = target[0, 0], target.shape[1] * target.itemsize
    for t in range(first, last):
        for d in range(0, row, LANES * target.itemsize):
            store_reals(target.ctypes.data + t * row + d, load_reals(source + t * stride + d, one))


@njit(**SETTINGS)
def _run(job, one):
    """Work on heads times splits until none is left; threads of one job share its counter and write partial results."""
    splits, K, M, D, size = job[SPLITS], job[HEADS], job[QUERIES], job[HEAD_DIM], job[PAGE_TOKENS]
    packed_k, packed_v, body, S = job[PACKED], job[PACKED + 1], job[BODY], job[SINKS]
    pages = (body + size - 1) // size
    q = carray(pointer_to(job[Q], one), (K, M, D))
    addresses = carray(pointer_to(job[ADDRESSES], np.int64(0)), (pages,))
    bias = carray(pointer_to(job[BIAS], one), (job[BIAS + 1],))
    numbers = carray(pointer_to(job[NUMBERS], one), (3,))
    tops = carray(pointer_to(job[PARTIAL], one), (K, splits, M))
    sums = carray(pointer_to(job[PARTIAL + 1], one), (K, splits, M))
    accs = carray(pointer_to(job[PARTIAL + 2], one), (K, splits, M, D))
    key, value = job[SIDE : SIDE + 7], job[SIDE + 7 : SIDE + 14]
    most = (max(size, S) + LANES - 1) // LANES * LANES
    steps, minima = np.empty(D * size, q.dtype), np.empty(D * size, q.dtype)
    keys, values, scores = np.empty((most, D), q.dtype), np.empty((most, D), q.dtype), np.empty((M, most), q.dtype)
    while True:
        unit = next_unit(job.ctypes.data)
        if unit >= K * splits:
            return
        head, split = unit // splits, unit % splits
        top, total_sum, acc = tops[head, split], sums[head, split], accs[head, split]
        top[:], total_sum[:], acc[:] = LOWEST, 0, 0
        if split == 0 and S:
            _copy(job[SINK] + head * job[SINK + 1], job[SINK + 2], 0, S, keys)
            _copy(job[SINK + 3] + head * job[SINK + 4], job[SINK + 5], 0, S, values)
            _take(q[head], keys, values, S, numbers[2], bias, 0, scores, top, total_sum, acc)
        for p in range(pages * split // splits, pages * (split + 1) // splits):
            first, count = p * size, min(size, body - p * size)
            from_k, from_v = min(count, max(0, packed_k - first)), min(count, max(0, packed_v - first))
            if from_k or from_v:
                page = addresses[p] + head * job[RECORD]
                at = page + job[OFFSETS], page + job[OFFSETS + 1], page + job[OFFSETS + 2], page + job[OFFSETS + 3]
                if from_k:
                    _numbers(at[0], at[2], key, numbers[0], steps, minima, keys[:size])
                if from_v:
                    _numbers(at[1], at[3], value, numbers[1], steps, minima, values[:size])
            _copy(job[EXACT] + head * job[EXACT + 1] + first * job[EXACT + 2], job[EXACT + 2], from_k, count, keys)
            _copy(
                job[EXACT + 3] + head * job[EXACT + 4] + first * job[EXACT + 5], job[EXACT + 5], from_v, count, values
            )
            _take(q[head], keys, values, count, numbers[2], bias, S + first, scores, top, total_sum, acc)


def compiled(real):
    """(run, merge) for float32 or float64 numbers (a numba type); compiled once and kept on disk.

    run   a C function of one pointer, that of the int64 job which ``cpu.decode_row`` writes.
    """
    zero = np.dtype(str(real)).type(0)

    def run(pointer):
        _run(carray(pointer, (JOB,)), real(zero))

    kind = types.void(types.CPointer(types.int64))
    return cfunc(kind, cache=True, nopython=True, error_model="numpy")(run), _merge
