"""Where numbers lie in a record, as kernels ask for it: channels and groups of an operand, scales, norms."""

import triton
import triton.language as tl

from kvq.kernels.device.words import e4m3_to_half, halves


@triton.constexpr_function
def group_of(S, chunk, block):
    """Channel group of one operand."""
    return 0 if S.groups == 1 else (chunk * S.width + block * S.block) // S.group


@triton.jit
def channels_of(chunk: tl.constexpr, block: tl.constexpr, S: tl.constexpr):
    """Channels of one operand, [C]; head_dim where the last block is not full."""
    first = chunk * S.chunk_stride + block * S.block * S.width_stride
    channel = first + tl.arange(0, S.block) * S.width_stride
    if S.width % S.block == 0:
        return channel
    else:
        return tl.where(block * S.block + tl.arange(0, S.block) < S.width, channel, S.head_dim)


@triton.jit
def load_meta(record, index, keep, S: tl.constexpr, MASKED: tl.constexpr, ASM: tl.constexpr):
    """(scale, minimum) of groups as fp16 (fp32 for powers of two), shaped like ``index``; without a minimum, twice the
    scale."""
    if S.terms == 2:
        at = record.to(tl.pointer_type(tl.int32)) + (S.meta_offset // 4 + index)
        pair = tl.load(at, mask=keep, other=0) if MASKED else tl.load(at)
        return halves(pair, ASM)
    elif S.meta == "float16":
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
def load_norm(record, token, keep, S: tl.constexpr, MASKED: tl.constexpr):
    """Norms of tokens, fp32."""
    at = record.to(tl.pointer_type(tl.float16)) + (S.norm_offset // 2 + token)
    return (tl.load(at, mask=keep, other=0.0) if MASKED else tl.load(at)).to(tl.float32)
