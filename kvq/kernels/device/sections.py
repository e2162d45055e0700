"""Where numbers lie in a record, as kernels ask for it: channels and groups of an operand, scales, norms."""

import triton
import triton.language as tl

from kvq.kernels.device.words import e4m3_to_half, halves


@triton.constexpr_function
def group_of(S, chunk, block):
    """Channel group of one operand."""
    return 0 if S.groups == 1 else (chunk * S.width + block * S.block) // S.group


@triton.constexpr_function
def slices(S):
    """How many slices a side has."""
    return len(S.slices)


@triton.constexpr_function
def slice_of(S, i):
    return S.slices[i]


@triton.constexpr_function
def first_operand(S, i):
    """Operands of the slices before slice i. A slice has one for every chunk and block of containers."""
    return sum(own.chunks * own.blocks for own in S.slices[:i])


@triton.constexpr_function
def operands(S):
    """How many operands a side has."""
    return sum(own.chunks * own.blocks for own in S.slices)


@triton.constexpr_function
def slice_at(S, n):
    """The slice of operand n."""
    return [own for own in S.slices for chunk in range(own.chunks) for c in range(own.blocks)][n]


@triton.constexpr_function
def slice_number(S, n):
    return [i for i, own in enumerate(S.slices) for chunk in range(own.chunks) for c in range(own.blocks)][n]


@triton.constexpr_function
def chunk_at(S, n):
    """The chunk of operand n within its slice."""
    return [chunk for own in S.slices for chunk in range(own.chunks) for c in range(own.blocks)][n]


@triton.constexpr_function
def block_at(S, n):
    """The block of containers of operand n within its slice."""
    return [c for own in S.slices for chunk in range(own.chunks) for c in range(own.blocks)][n]


@triton.jit
def local_channels(chunk: tl.constexpr, block: tl.constexpr, S: tl.constexpr):
    """Channels of one operand within its slice, [C]; the slice's width where the last block is not full."""
    first = chunk * S.chunk_stride + block * S.block * S.width_stride
    channel = first + tl.arange(0, S.block) * S.width_stride
    if S.width % S.block == 0:
        return channel
    else:
        return tl.where(block * S.block + tl.arange(0, S.block) < S.width, channel, S.head_dim)


@triton.jit
def channels_of(chunk: tl.constexpr, block: tl.constexpr, S: tl.constexpr):
    """Channels of one operand within the head, [C]; beyond the slice where the last block is not full."""
    return S.first + local_channels(chunk, block, S)


@triton.jit
def head_channels(n: tl.constexpr, S: tl.constexpr):
    """Channels of operand n within the head, [C]."""
    return channels_of(chunk_at(S, n), block_at(S, n), slice_at(S, n))


@triton.jit
def load_pair(records, index, keep, S: tl.constexpr, MASKED: tl.constexpr, ASM: tl.constexpr):
    """(scale, minimum) of groups as they are stored with two terms: fp16, a minimum of ``zero8`` and ``range8`` as its
    byte; shaped like ``index``."""
    record = records[1] if S.meta_shared else records[0]
    if S.meta == "float16":
        at = record.to(tl.pointer_type(tl.int32)) + (S.meta_offset // 4 + index)
        pair = tl.load(at, mask=keep, other=0) if MASKED else tl.load(at)
        return halves(pair, ASM)
    else:
        at = record.to(tl.pointer_type(tl.int16)) + (S.meta_offset // 2 + index)
        pair = (tl.load(at, mask=keep, other=0) if MASKED else tl.load(at)).to(tl.int32)
        if S.meta == "e4m3":
            return e4m3_to_half(pair & 0xFF), e4m3_to_half(pair >> 8 & 0xFF)
        else:
            # An exponent of 2^10 above a byte is 1024 + byte.
            byte = (pair >> 8 & 0xFF | 0x6400).to(tl.int16).to(tl.float16, bitcast=True) - 1024.0
            return (pair << 7 & 0x7F80).to(tl.int16).to(tl.float16, bitcast=True), byte


@triton.constexpr_function
def minimum_share(S):
    """What a byte of ``zero8`` is multiplied by, besides the scale."""
    return -(2**S.bits - 1) / 255


@triton.jit
def load_range(records, group, keep, S: tl.constexpr, MASKED: tl.constexpr, ASM: tl.constexpr):
    """(low, step) of the minima of token groups, fp32, for ``range8``; shaped like ``group`` and the record."""
    at = records[0].to(tl.pointer_type(tl.int32)) + (S.range_offset // 4 + group)
    low, step = halves(tl.load(at, mask=keep, other=0) if MASKED else tl.load(at), ASM)
    return low.to(tl.float32), step.to(tl.float32)


@triton.jit
def load_meta(records, index, group, keep, S: tl.constexpr, MASKED: tl.constexpr, ASM: tl.constexpr):
    """(scale, minimum) of groups, fp32 where the minimum is computed and for powers of two, else fp16; without a
    minimum, twice the scale.

    index   of the pair, of any shape; group: token group of each, of the same shape, for ``range8``.
    """
    if S.terms == 2:
        scale, minimum = load_pair(records, index, keep, S, MASKED, ASM)
        if S.meta == "range8":
            low, step = load_range(records, group, keep, S, MASKED, ASM)
            return scale, low + minimum.to(tl.float32) * step
        elif S.meta == "zero8":
            return scale, scale.to(tl.float32) * (minimum.to(tl.float32) * minimum_share(S))
        else:
            return scale, minimum
    else:
        record = records[1] if S.meta_shared else records[0]
        if S.meta == "float16":
            at = record.to(tl.pointer_type(tl.float16)) + (S.meta_offset // 2 + index)
            scale = tl.load(at, mask=keep, other=0.0) if MASKED else tl.load(at)
            return scale, scale
        else:
            at = record + (S.meta_offset + index)
            byte = (tl.load(at, mask=keep, other=0) if MASKED else tl.load(at)).to(tl.int32)
            if S.meta == "e8m0":
                scale = (byte << 23).to(tl.float32, bitcast=True)
            else:
                scale = e4m3_to_half(byte)
            return scale, scale


@triton.jit
def load_norm(records, token, keep, S: tl.constexpr, MASKED: tl.constexpr):
    """Norms of tokens, fp32."""
    record = records[1] if S.norm_shared else records[0]
    at = record.to(tl.pointer_type(tl.float16)) + (S.norm_offset // 2 + token)
    return (tl.load(at, mask=keep, other=0.0) if MASKED else tl.load(at)).to(tl.float32)
