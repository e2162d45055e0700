"""Scales and minima on the device: rounded to how they are stored, stored, and read back (``kvq/pages/meta.py``).

The arithmetic is fp32, every operation rounds as IEEE says and none is fused, so that the bytes do not depend on how
many tokens come at a time, nor on the device. Where a number was NaN or infinite, so is what is stored.
"""

import triton
import triton.language as tl

from kvq.kernels.device.sections import minimum_share
from kvq.kernels.device.words import e4m3_to_half
from kvq.pages.layout import E4M3_MAX

# Adding and subtracting 1.5 * 2^23 rounds a small number to the nearest integer, halves to even.
_ROUND = tl.constexpr(12582912.0)
_LARGEST_E4M3 = tl.constexpr(E4M3_MAX)
# The largest UE5M3 byte that is finite in fp16, and one that is NaN there.
_LARGEST_UE5M3 = tl.constexpr(0xF7)
_NAN_UE5M3 = tl.constexpr(0xFC)
# The exponent of the largest E2M1 number, 6 = 1.5 * 2^2, and that number.
_E2M1_EXPONENT = tl.constexpr(2)
_LARGEST_E2M1 = tl.constexpr(6.0)
# The smallest E8M0 scale, 2^-127, as bits of a subnormal number.
_SMALLEST_E8M0 = tl.constexpr(0x400000)


@triton.jit
def rounded(x):
    """The nearest integer as fp32, halves to even; |x| below 2^22."""
    return (x + _ROUND) - _ROUND


@triton.jit
def to_e4m3(x):
    """fp32 to e4m3 bytes (int32), rounded to nearest even, saturating at 448; NaN gives the NaN byte."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = tl.minimum(tl.abs(x), _LARGEST_E4M3)
    # Below 2^-6 the byte counts steps of 2^-9; above, it is the upper bits of the fp32 number, rebiased by 120.
    small = rounded(magnitude * 512.0).to(tl.int32)
    wide = magnitude.to(tl.int32, bitcast=True)
    normal = (wide + 0x7FFFF + (wide >> 20 & 1) >> 20) - (120 << 3)
    byte = tl.where(magnitude < 0.015625, small, normal)
    byte = tl.where(x != x, 0x7F, byte)
    return byte | (bits >> 24 & 0x80)


@triton.jit
def to_ue5m3(x):
    """fp32 numbers of 0 or more to UE5M3 bytes (int32): rounded to fp16, then to three bits of mantissa."""
    bits = x.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    byte = tl.minimum(bits + 63 + (bits >> 7 & 1) >> 7, _LARGEST_UE5M3)
    return tl.where(x != x, _NAN_UE5M3, byte)


@triton.jit
def ue5m3_number(byte):
    return (byte << 7).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def half_bits(x):
    """Bits of fp16 numbers, int32."""
    return x.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.constexpr_function
def steps_of(S):
    return float(2**S.bits - 1)


@triton.constexpr_function
def scale_share(S):
    """What the scale of symmetric codes is of the largest magnitude."""
    return 2.0 / 2**S.bits


@triton.constexpr_function
def symmetric_minimum(S):
    """What the minimum of symmetric codes is of their scale."""
    return -float(2 ** (S.bits - 1))


@triton.jit
def or_infinity(divisor):
    """Divided by infinity everything is 0: so is what has no range."""
    return tl.where(divisor == 0.0, float("inf"), divisor)


@triton.jit
def clipped(low, high, cut, CLIP: tl.constexpr):
    """The ends of a range without the share ``cut`` at each."""
    if CLIP:
        off = (high - low) * cut
        return low + off, high - off
    else:
        return low, high


@triton.jit
def _store_halves(record, index, keep, first, second, S: tl.constexpr):
    at = record.to(tl.pointer_type(tl.int32)) + (S.meta_offset // 4 + index)
    tl.store(at, half_bits(first) | half_bits(second) << 16, mask=keep)


@triton.jit
def store_bytes(record, index, keep, first, second, S: tl.constexpr):
    """The two bytes of pairs."""
    at = record.to(tl.pointer_type(tl.int16)) + (S.meta_offset // 2 + index)
    tl.store(at, (first | second << 8).to(tl.int16), mask=keep)


@triton.jit
def store_meta(
    record, index, keep, low, high, poison, cut, scale, S: tl.constexpr, E: tl.constexpr, CLIP: tl.constexpr
):
    """Choose and store the metadata of groups with these ends, of all forms but range8; returns (scale, minimum) as the
    codes are made with them, fp32 of the shape of ``index``.

    record, index, keep   where a group's numbers lie, counted in groups, and whether they are stored.
    poison   NaN where a number was NaN or infinite. cut: share of the range that is left out at each end, if CLIP.
    scale    the static factor of a side (``e2m1``).
    """
    bad = poison != poison
    top = tl.where(bad, float("nan"), tl.maximum(tl.abs(low), tl.abs(high)))
    if E.encoding == "minmax":
        low, high = clipped(low, high, cut, CLIP)
        if S.meta == "zero8":
            low, high = tl.minimum(low, 0.0), tl.maximum(high, 0.0)
        return _store_range(record, index, keep, low, high, bad, S)
    elif E.encoding == "range":
        half, middle = tl.div_rn(high - low, 2.0), tl.div_rn(high + low, 2.0)
        first = tl.where(bad, float("nan"), half).to(tl.float16)
        second = tl.where(bad, float("nan"), middle).to(tl.float16)
        _store_halves(record, index, keep, first, second, S)
        return first.to(tl.float32), second.to(tl.float32)
    elif E.encoding == "e2m1":
        return _store_block_scale(record, index, keep, top, scale, S), tl.zeros_like(top)
    elif E.encoding == "symmetric":
        own = _store_scale(record, index, keep, top * scale_share(S), S)
        return own, own * symmetric_minimum(S)
    else:
        return _store_scale(record, index, keep, top, S), tl.zeros_like(top)


@triton.jit
def _store_range(record, index, keep, low, high, bad, S: tl.constexpr):
    scale = tl.where(bad, float("nan"), tl.div_rn(high - low, steps_of(S)))
    low = tl.where(bad, float("nan"), low)
    if S.meta == "float16":
        first, second = scale.to(tl.float16), low.to(tl.float16)
        _store_halves(record, index, keep, first, second, S)
        return first.to(tl.float32), second.to(tl.float32)
    elif S.meta == "e4m3":
        first, second = to_e4m3(scale), to_e4m3(low)
        store_bytes(record, index, keep, first, second, S)
        return e4m3_to_half(first).to(tl.float32), e4m3_to_half(second).to(tl.float32)
    else:
        first = to_ue5m3(scale)
        stored = ue5m3_number(first)
        ratio = tl.div_rn(low * -255.0, or_infinity(stored * steps_of(S)))
        byte = tl.minimum(tl.maximum(rounded(ratio), 0.0), 255.0)
        store_bytes(record, index, keep, first, byte.to(tl.int32), S)
        return stored, stored * (byte * minimum_share(S))


@triton.jit
def _store_scale(record, index, keep, scale, S: tl.constexpr):
    if S.meta == "float16":
        half = scale.to(tl.float16)
        tl.store(record.to(tl.pointer_type(tl.float16)) + (S.meta_offset // 2 + index), half, mask=keep)
        return half.to(tl.float32)
    else:
        byte = to_e4m3(scale)
        tl.store(record + (S.meta_offset + index), byte.to(tl.uint8), mask=keep)
        return e4m3_to_half(byte).to(tl.float32)


@triton.jit
def _store_block_scale(record, index, keep, top, scale, S: tl.constexpr):
    """MXFP4's power of two below the largest magnitude, and NVFP4's share of it."""
    if S.meta == "e8m0":
        byte = tl.maximum((top.to(tl.int32, bitcast=True) >> 23 & 0xFF) - _E2M1_EXPONENT, 0)
        number = tl.where(byte == 0, _SMALLEST_E8M0, byte << 23).to(tl.float32, bitcast=True)
    else:
        byte = to_e4m3(tl.div_rn(tl.div_rn(top, _LARGEST_E2M1), scale))
        number = e4m3_to_half(byte).to(tl.float32) * scale
    tl.store(record + (S.meta_offset + index), byte.to(tl.uint8), mask=keep)
    return number


@triton.jit
def range_of_minima(least, most):
    """(low, step) fp16 of the minima of a block's channels, for range8: no minimum is below low."""
    low = least.to(tl.float16)
    bits = half_bits(low)
    below = tl.where(bits & 0x7FFF == 0, 0x8001, tl.where(bits >> 15 == 1, bits + 1, bits - 1))
    below = below.to(tl.int16).to(tl.float16, bitcast=True)
    low = tl.where(low.to(tl.float32) > least, below, low)
    return low, tl.div_rn(most - low.to(tl.float32), 255.0).to(tl.float16)


@triton.jit
def store_range8(record, index, keep, low, high, start, step, S: tl.constexpr):
    """The pairs of channels with these ends, fp32, whose minima are multiples of ``step`` (fp16) above ``start``."""
    start, step = start.to(tl.float32), step.to(tl.float32)
    # Rounded down, so that the lowest number of a group stays inside its range.
    code = tl.minimum(tl.maximum(tl.floor(tl.div_rn(low - start, or_infinity(step))), 0.0), 255.0)
    span = high - (start + code * step)
    span = tl.where(span < 0.0, 0.0, span)
    store_bytes(record, index, keep, to_ue5m3(tl.div_rn(span, steps_of(S))), code.to(tl.int32), S)
