"""Dequantize pages into dense tensors: for prefill over a packed prefix, and for whatever cannot read pages."""

import triton
import triton.language as tl

from kvq.kernels.device.sections import channels_of, group_of, load_meta, load_norm
from kvq.kernels.device.words import bias_of, known, unpack
from kvq.kernels.pack.kernel import PACK_ROWS


@triton.jit(do_not_specialize=["table_stride", "book"])
def unpack_pages(
    pool,
    table,
    lengths,
    out,
    out_batch_stride,
    out_head_stride,
    out_token_stride,
    table_stride,
    page_stride,
    static_scale,
    book,
    S: tl.constexpr,
    RECORD: tl.constexpr,
    ASM: tl.constexpr,
):
    """Grid (blocks of PACK_ROWS rows over all pages, B, KV heads): one side to out [B, KV heads, tokens, head_dim].

    lengths [B] int32: tokens to write; what lies after them is left alone.
    """
    blocks: tl.constexpr = (S.rows + PACK_ROWS - 1) // PACK_ROWS
    page = tl.program_id(0) // blocks
    sequence = tl.program_id(1)
    head = tl.program_id(2)
    length = tl.load(lengths + sequence)
    if page * S.page_tokens >= length:
        return
    wide = sequence.to(tl.int64)
    number = tl.load(table + wide * table_stride + page).to(tl.int64)
    record = pool + number * page_stride + head * RECORD
    to = out + wide * out_batch_stride + head.to(tl.int64) * out_head_stride
    row = tl.program_id(0) % blocks * PACK_ROWS + tl.arange(0, PACK_ROWS)
    for c in tl.static_range(known(S.blocks)):
        container = c * S.block + tl.arange(0, S.block)
        words = ()
        for w in tl.static_range(known(S.words)):
            at = S.words_offset // 2 + row[:, None] * S.row_words + w * S.width + container[None, :]
            keep = (row < S.rows)[:, None] & (container < S.width)[None, :]
            words = words + (tl.load(record.to(tl.pointer_type(tl.int16)) + at, mask=keep, other=0),)
        planes = unpack(words, book, S, ASM)
        for f in tl.static_range(known(S.fields)):
            channel = channels_of(f % S.chunks, c, S)
            inside = f // S.chunks * S.rows + row
            token = page * S.page_tokens + inside
            keep = ((row < S.rows) & (token < length))[:, None] & (channel < S.head_dim)[None, :]
            x = planes[f].to(tl.float32) - bias_of(S, f)
            if S.terms > 0:
                if S.by_channel:
                    at = (inside // S.group * S.head_dim)[:, None] + channel[None, :]
                else:
                    at = (inside * S.groups + group_of(S, f % S.chunks, c))[:, None] + tl.zeros_like(channel)[None, :]
                scale, minimum = load_meta(record, at, keep, S, True, ASM)
                x = x * scale.to(tl.float32)
                if S.terms == 2:
                    x += minimum.to(tl.float32)
            if S.norm_offset >= 0:
                x = x * load_norm(record, inside, (row < S.rows) & (token < length), S, True)[:, None]
            x = x * static_scale
            at = token.to(tl.int64)[:, None] * out_token_stride + channel[None, :]
            tl.store(to + at, x.to(out.dtype.element_ty), mask=keep)
