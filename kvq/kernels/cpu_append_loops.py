"""The loop behind ``cpu.append_token``. Imported on first use, since it needs numba and compiles.

Without ``fastmath``: the bytes must be those of the torch reference.
"""

import numpy as np
from numba import njit, types

SETTINGS = {"cache": True, "nogil": True, "error_model": "numpy"}
# The largest fp16 number.
LIMIT = 65504.0


@njit(**SETTINGS)
def _to_half(number, single):
    """Bits of a float rounded to fp16, half to even; ``single`` is one float32 of room."""
    single[0] = number
    bits = single.view(np.int32)[0]
    sign, size = (bits >> 16) & 0x8000, bits & 0x7FFFFFFF
    if size < 0x38800000:
        return np.uint16(sign | np.int32(np.rint(np.abs(single[0]) * np.float32(2.0**24))))
    size -= 0x38000000
    return np.uint16(sign | ((size + 0xFFF + ((size >> 13) & 1)) >> 13))


@njit(**SETTINGS)
def _from_half(half, single):
    single.view(np.int32)[0] = ((np.int32(half) & 0x7FFF) << 13) | ((np.int32(half) & 0x8000) << 16)
    return single[0] * np.float32(2.0**112)


@njit(**SETTINGS)
def _store(words, row, bits, chunks, width, part, keep, codes):
    """Write the codes of one token as part ``part`` of a row of words, and clear the parts after it."""
    containers = 3 if bits == 3 else 1
    for i in range(width):
        for w in range(containers):
            words[(row * containers + w) * width + i] &= keep[w * width + i]
        for chunk in range(chunks):
            field, code = part * chunks + chunk, codes[chunk * width + i]
            place = row * containers * width + i
            if bits == 3 and field == 15:
                for w in range(3):
                    words[place + w * width] |= np.uint16(((code >> w) & 1) << 15)
            elif bits == 3:
                words[place + field // 5 * width] |= np.uint16(code << 3 * (field % 5))
            elif bits == 4 and field == 3:
                words[place] |= np.uint16((code >> 2) | ((code & 3) << 14))
            else:
                words[place] |= np.uint16(code << (bits * field + (2 if bits == 4 else 0)))


def _append(tokens, records, sizes, side, slot, keep):
    """Quantize a token [K, D] and write it as token ``slot`` of a page, records [K, record bytes].

    Returns False, with nothing of that head written, where numbers are not finite or too large for the metadata.
    """
    words_at, words_bytes, meta_at = sizes
    bits, group, rows, chunks, width, groups = side[0], side[2], side[3], side[4], side[5], side[6]
    D, steps, real = tokens.shape[1], (1 << side[0]) - 1, tokens.dtype.type
    part, row = slot // rows, slot % rows
    codes, single = np.empty(D, np.int32), np.empty(1, np.float32)
    for head in range(tokens.shape[0]):
        words = records[head, words_at : words_at + words_bytes].view(np.uint16)
        meta = records[head, meta_at + 4 * slot * groups : meta_at + 4 * (slot + 1) * groups].view(np.uint16)
        for g in range(groups):
            low = high = tokens[head, g * group]
            for d in range(g * group, (g + 1) * group):
                number = tokens[head, d]
                if not abs(number) <= LIMIT:
                    return False
                low, high = min(low, number), max(high, number)
            meta[2 * g], meta[2 * g + 1] = _to_half((high - low) / real(steps), single), _to_half(low, single)
            scale, minimum = real(_from_half(meta[2 * g], single)), real(_from_half(meta[2 * g + 1], single))
            for d in range(g * group, (g + 1) * group):
                code = real(0) if scale == 0 else np.rint((tokens[head, d] - minimum) / scale)
                codes[d] = np.int32(min(max(code, real(0)), real(steps)))
        _store(words, row, bits, chunks, width, part, keep, codes)
    return True


def compiled(real):
    """The loop for tokens of one float type (a numba type)."""
    integers = types.int64[::1]
    kind = types.boolean(
        real[:, :], types.uint8[:, ::1], types.UniTuple(types.int64, 3), integers, types.int64, types.uint16[::1]
    )
    return njit(kind, **SETTINGS)(_append)
