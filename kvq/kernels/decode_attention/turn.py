"""Queries as keys in a frame are read with, turned to one block of tokens after another (``types.KeyFrame``).

A program turns its own queries a few rounds ahead, to memory that it writes again and again and that therefore stays in
the cache of the device; its loop then reads them like pages.
"""

import triton
import triton.language as tl

from kvq.kernels.device.sections import head_channels, operands
from kvq.kernels.device.words import known


@triton.constexpr_function
def _padded(D):
    return 1 << (D - 1).bit_length()


@triton.constexpr_function
def _turned(D, C):
    """Blocks that C queries are turned to at a time."""
    return max(1, (64 if D <= 128 else 32) // C)


@triton.constexpr_function
def _columns(D):
    """Columns of the matrix that are multiplied with at a time."""
    return min(64, _padded(D))


@triton.constexpr_function
def frames(K, T):
    """Blocks of the frame in a tile, which is one page; 1 without a frame."""
    return max(1, K.page_tokens // T.frame) if T.frame else 1


@triton.constexpr_function
def frame_of(K, T, b):
    """Block of the frame, of those of the tile, that block b of the tile lies in."""
    return b * T.stride // T.frame if T.frame and T.frame < K.page_tokens else 0


@triton.constexpr_function
def _longer(D):
    """No vector is longer than its largest number times this; rounding adds a little."""
    return 1.01 * D**0.5


@triton.jit
def power_of_two(n):
    """2^n in fp32, n of int32 in [-126, 127]."""
    return ((127 + n) << 23).to(tl.float32, bitcast=True)


@triton.jit
def turned_exponent(at, real, growth, E: tl.constexpr, D: tl.constexpr):
    """n so that 2^n times the length of every turned query is below 2^E. at: pointers [H] to the vectors."""
    d = tl.arange(0, _padded(D))[None, :]
    x = tl.load(at[:, None] + d, mask=real[:, None] & (d < D), other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(x)) * growth * _longer(D)
    exponent = E - 1 - ((largest.to(tl.int32, bitcast=True) >> 23) - 127)
    return tl.minimum(tl.maximum(exponent, -60), 60)


@triton.jit
def turn(
    first,
    end,
    q_at,
    q_head_stride,
    q_token_stride,
    first_column,
    index_at,
    head,
    frame,
    to,
    bias_to,
    exponent,
    bias_factor,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    C: tl.constexpr,
    MATRIX: tl.constexpr,
    MEAN: tl.constexpr,
):
    """Turn C query columns to blocks [first, end) of the frame: fp16 ``to`` [end - first, C, D], fp32
    ``bias_to`` [end - first, C].

    q_at      the sequence's query heads of this KV head. index_at: the sequence's row of ``KeyFrame.index``.
    exponent  of ``turned_exponent``; bias_factor: what a bias is multiplied by, to be in the units of scores.
    """
    turns, partner, matrix, mean = frame[1], frame[2], frame[3], frame[4]
    TURNED: tl.constexpr = _turned(D, C)
    N: tl.constexpr = _columns(D)
    d = tl.arange(0, _padded(D))[None, None, :]
    inside = d < D
    c = (first_column + tl.arange(0, C))[None, :, None]
    own = q_at + c // QUERIES * q_head_stride + c % QUERIES * q_token_stride
    real = (c < HEADS * QUERIES) & inside
    up = power_of_two(exponent)
    x = tl.load(own + d, mask=real, other=0.0).to(tl.float32) * up
    y = tl.load(own + tl.load(partner + d, mask=inside, other=0), mask=real, other=0.0).to(tl.float32) * up
    centre = tl.load(mean + head * D + d, mask=inside & MEAN, other=0.0) * (bias_factor / up)
    block = tl.arange(0, TURNED)
    row = tl.arange(0, TURNED * C)[:, None]
    i = tl.arange(0, _padded(D))[:, None]
    for start in tl.range(0, end - first, TURNED, num_stages=1):
        there = start + block < end - first
        number = tl.load(index_at + first + start + block, mask=there, other=0).to(tl.int64)[:, None, None] * (2 * D)
        cos = tl.load(turns + number + d, mask=inside, other=0.0)
        sin = tl.load(turns + number + D + d, mask=inside, other=0.0)
        t = x * cos + y * sin
        if MEAN:
            bias_at = bias_to + start * C + block[:, None] * C + tl.arange(0, C)[None, :]
            tl.store(bias_at, tl.sum(t * centre, 2), mask=there[:, None])
        half = tl.reshape(t.to(tl.float16), [TURNED * C, _padded(D)])
        to_row = to + start * (C * D) + row * D
        keep = row < (end - first - start) * C
        if MATRIX:
            for n in tl.static_range(known(_padded(D) // N)):
                column = n * N + tl.arange(0, N)[None, :]
                m = tl.load(matrix + head * (D * D) + i * D + column, mask=(i < D) & (column < D), other=0.0)
                tl.store(to_row + column, tl.dot(half, m).to(tl.float16), mask=keep & (column < D))
        else:
            column = tl.arange(0, _padded(D))[None, :]
            tl.store(to_row + column, half, mask=keep & (column < D))


@triton.jit
def load_turned(
    at, bias_at, start, K: tl.constexpr, T: tl.constexpr, H: tl.constexpr, C: tl.constexpr, MEAN: tl.constexpr
):
    """What a tile's keys are multiplied by, for each of its blocks of the frame: (operands [W, C, H] fp16, bias
    [W, 1, H] fp32).

    at, bias_at  the turned queries of the block of the frame that ``start`` [W, 1], a token, is counted from.
    """
    column = tl.arange(0, H)
    block = (start // T.frame)[:, :, None]
    found = ()
    for j in tl.static_range(known(frames(K, T))):
        row = (block + j) * C + column[None, None, :]
        vectors = ()
        for n in tl.static_range(operands(K)):
            channel = head_channels(n, K)[None, :, None]
            keep = (column < C)[None, None, :] & (channel < K.head_dim)
            vectors = vectors + (tl.load(at + row * K.head_dim + channel, mask=keep, other=0.0),)
        bias = tl.zeros([1, 1, H], tl.float32)
        if MEAN:
            bias = tl.load(bias_at + row, mask=(column < C)[None, None, :], other=0.0)
        found = found + ((vectors, bias),)
    return found
