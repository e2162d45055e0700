"""Loops of calibration on the CPU, compiled by numba: one pass over a tensor where torch takes one for each result.

Arrays are [N, T, C], C-contiguous; row n belongs to group n % R of R, and column c is a channel of it. Magnitudes are
compared as the integers that their bits are: the order is the same, and NaN comes out on top. Every function of one
pointer is a job for ``kvq.kernels.team.share``, and units of its work write to places of their own.
"""

import numpy as np
from numba import carray, cfunc, njit, types

from kvq.kernels.lanes import next_unit, pointer_to

SETTINGS = {"cache": True, "error_model": "numpy", "nogil": True}
# Where a job's numbers lie: a unit is WIDTH columns, or one row; arrays are addresses.
COUNTER, UNITS, WIDTH, ROWS, TOKENS, COLUMNS, GROUPS, LOWEST, SHIFT, LEVELS, STRIDE, ARRAYS, JOB = (*range(12), 16)
_MAGNITUDE = np.int32(0x7FFFFFFF)


# Columns are bounds, not slices: the compiler then knows that numbers lie side by side. Unsigned ones, since a signed
# place may count from the end, and looking for that costs all that vectors gain.
@njit(**SETTINGS)
def _range(x, first, last, low, high, total, squares):
    for n in range(x.shape[0]):
        group = n % len(low)
        own_low, own_high, own_total, own_squares = low[group], high[group], total[group], squares[group]
        for t in range(x.shape[1]):
            row = x[n, t]
            for c in range(np.uintp(first), np.uintp(last)):
                number = row[c]
                # A NaN is taken, and then stays.
                own_low[c] = number if (number < own_low[c]) | (number != number) else own_low[c]
                own_high[c] = number if (number > own_high[c]) | (number != number) else own_high[c]
            for c in range(np.uintp(first), np.uintp(last)):
                wide = np.float64(row[c])
                own_total[c] += wide
                own_squares[c] += wide * wide


@njit(**SETTINGS)
def _count(bits, first, last, counts, lowest, shift, levels):
    for n in range(bits.shape[0]):
        own = counts[n % len(counts)]
        for t in range(bits.shape[1]):
            for c in range(np.uintp(first), np.uintp(last)):
                number = bits[n, t, c]
                level = min(max(((number & _MAGNITUDE) >> shift) - lowest, 0), levels)
                own[c, levels + (-level if number < 0 else level)] += 1


@njit(**SETTINGS)
def _massive(bits, valid, token_peak, channel_peak, counts, lowest, shift, stride):
    levels = len(counts) - 1
    for t in range(bits.shape[0]):
        row, top = bits[t], np.int32(0)
        for c in range(bits.shape[1]):
            top = max(top, row[c] & _MAGNITUDE)
        token_peak[t] = top
        if not valid[t]:
            continue
        for c in range(bits.shape[1]):
            channel_peak[c] = max(channel_peak[c], row[c] & _MAGNITUDE)
        for c in range(0, bits.shape[1], stride):
            counts[min(max(((row[c] & _MAGNITUDE) >> shift) - lowest, 0), levels)] += 1


@njit(**SETTINGS)
def _array(job, number, like, shape):
    return carray(pointer_to(job[ARRAYS + number], like), shape)


def _job(function):
    kind = types.void(types.CPointer(types.int64))
    return cfunc(kind, cache=True, nopython=True, error_model="numpy")(function)


@_job
def channel_range(pointer):
    """x float32 into minima and maxima float32 [R, C], sums and sums of squares float64 [R, C]."""
    job = carray(pointer, (JOB,))
    places = job[GROUPS], job[COLUMNS]
    x = _array(job, 0, np.float32(0), (job[ROWS], job[TOKENS], job[COLUMNS]))
    low, high = _array(job, 1, np.float32(0), places), _array(job, 2, np.float32(0), places)
    total, squares = _array(job, 3, np.float64(0), places), _array(job, 4, np.float64(0), places)
    while True:
        unit = next_unit(job.ctypes.data)
        if unit >= job[UNITS]:
            return
        first = unit * job[WIDTH]
        _range(x, first, min(first + job[WIDTH], job[COLUMNS]), low, high, total, squares)


@_job
def count_signed(pointer):
    """Bits of float32 numbers, int32, counted in int32 [R, C, 2 * levels + 1]: ``kvq.calib.kinds.histogram``."""
    job = carray(pointer, (JOB,))
    bits = _array(job, 0, np.int32(0), (job[ROWS], job[TOKENS], job[COLUMNS]))
    counts = _array(job, 1, np.int32(0), (job[GROUPS], job[COLUMNS], 2 * job[LEVELS] + 1))
    while True:
        unit = next_unit(job.ctypes.data)
        if unit >= job[UNITS]:
            return
        first = unit * job[WIDTH]
        last = min(first + job[WIDTH], job[COLUMNS])
        _count(bits, first, last, counts, job[LOWEST], job[SHIFT], job[LEVELS])


@_job
def massive(pointer):
    """Bits of hidden states, int32 [N, T, C], and valid uint8 [N, T], into the largest magnitude of each token, int32
    [N, T], and, over the valid tokens of each row, of each channel, int32 [N, C]; and the magnitudes of every
    ``STRIDE``-th channel of valid tokens counted in int64 [N, levels + 1].
    """
    job = carray(pointer, (JOB,))
    rows, tokens, columns = job[ROWS], job[TOKENS], job[COLUMNS]
    bits, valid = _array(job, 0, np.int32(0), (rows, tokens, columns)), _array(job, 1, np.uint8(0), (rows, tokens))
    peaks = _array(job, 2, np.int32(0), (rows, tokens))
    channels = _array(job, 3, np.int32(0), (rows, columns))
    counts = _array(job, 4, np.int64(0), (rows, job[LEVELS] + 1))
    while True:
        n = next_unit(job.ctypes.data)
        if n >= job[UNITS]:
            return
        _massive(bits[n], valid[n], peaks[n], channels[n], counts[n], job[LOWEST], job[SHIFT], job[STRIDE])
