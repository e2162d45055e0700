"""Hadamard rotation of queries and keys, block by block, as one product a block."""

import triton
import triton.language as tl

# Vectors of a program.
ROWS = tl.constexpr(16)


@triton.jit
def hadamard_entries(i, j, BLOCK: tl.constexpr):
    """Entries of a block-diagonal Sylvester Hadamard matrix, 1, -1 or 0. Blocks of up to 256."""
    common = i & j & (BLOCK - 1)
    common = common ^ (common >> 4)
    common = common ^ (common >> 2)
    common = common ^ (common >> 1)
    return tl.where(i // BLOCK == j // BLOCK, 1.0 - 2.0 * (common & 1).to(tl.float32), 0.0)


@triton.jit
def rotated(x, signs, channel, D: tl.constexpr, ROTATE: tl.constexpr, ASM: tl.constexpr):
    """x [R, every] (every: the power of two that holds head_dim) rotated, channels [C] of it, fp32.

    Products with 1 and -1 are exact in the dtype of x, and sums are fp32.
    """
    d = tl.arange(0, x.shape[1])
    x = x * tl.load(signs + d, mask=d < D, other=0.0).to(x.dtype)[None, :]
    matrix = hadamard_entries(d[:, None], channel[None, :], ROTATE)
    if x.dtype == tl.float32 or ASM == 0:
        y = tl.dot(x.to(tl.float32), matrix, input_precision="ieee")
    else:
        y = tl.dot(x, matrix.to(x.dtype))
    return y * (ROTATE**-0.5)


@triton.jit(do_not_specialize=["rows", "tokens", "heads"])
def hadamard_rotate(
    x,
    out,
    signs,
    rows,
    tokens,
    heads,
    x_batch_stride,
    x_head_stride,
    x_token_stride,
    out_batch_stride,
    out_head_stride,
    out_token_stride,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    SIGNS: tl.constexpr,
    INVERSE: tl.constexpr,
    ASM: tl.constexpr,
):
    """Grid (blocks of ROWS vectors, head_dim / BLOCK): x [B, heads, tokens, D] to out, rows = B * heads * tokens.

    Forward: (x * signs) H; INVERSE: (x H) * signs, as H is symmetric and its own inverse.
    """
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    real = row < rows
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    batch, head, token = row // tokens // heads, row // tokens % heads, row % tokens
    from_ = batch * x_batch_stride + head * x_head_stride + token * x_token_stride
    own = tl.load(x + from_[:, None] + channel[None, :], mask=real[:, None], other=0.0)
    if SIGNS:
        sign = tl.load(signs + channel).to(own.dtype)
        if not INVERSE:
            own = own * sign[None, :]
    i = tl.arange(0, BLOCK)
    matrix = hadamard_entries(i[:, None], i[None, :], BLOCK)
    if own.dtype == tl.float32 or ASM == 0:
        y = tl.dot(own.to(tl.float32), matrix, input_precision="ieee")
    else:
        # Products with 1 and -1 are exact, and sums are fp32.
        y = tl.dot(own, matrix.to(own.dtype))
    y = y * (BLOCK**-0.5)
    if SIGNS and INVERSE:
        y = y * sign.to(tl.float32)[None, :]
    to = batch * out_batch_stride + head * out_head_stride + token * out_token_stride
    tl.store(out + to[:, None] + channel[None, :], y.to(out.dtype.element_ty), mask=real[:, None])
