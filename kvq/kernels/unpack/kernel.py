"""Dequantize pages into dense tensors: what cannot read pages reads these."""

import triton
import triton.language as tl

from kvq.kernels.device.sections import channels_of, group_of, load_meta, load_norm, local_channels, slice_of, slices
from kvq.kernels.device.words import bias_of, known, unpack
from kvq.kernels.pack.encode import PACK_ROWS


@triton.jit(do_not_specialize=["table_stride", "first_page", "room", "book"])
def unpack_pages(
    pool,
    table,
    lengths,
    out,
    out_batch_stride,
    out_head_stride,
    out_page_stride,
    out_token_stride,
    table_stride,
    page_stride,
    first_page,
    room,
    static_scale,
    book,
    S: tl.constexpr,
    BLOCKS: tl.constexpr,
    RECORD: tl.constexpr,
    ASM: tl.constexpr,
):
    """Grid (BLOCKS blocks of PACK_ROWS rows a page, B, KV heads): one side to out [B, KV heads, tokens, head_dim].

    lengths [B] int32: tokens that there are; what lies after them is left alone. out begins with page ``first_page``
    and has room for ``room`` tokens.
    """
    local = tl.program_id(0) // BLOCKS
    page = first_page + local
    sequence = tl.program_id(1)
    head = tl.program_id(2)
    length = tl.minimum(tl.load(lengths + sequence) - page * S.page_tokens, room - local * S.page_tokens)
    if length <= 0:
        return
    wide = sequence.to(tl.int64)
    number = tl.load(table + wide * table_stride + page).to(tl.int64)
    record = pool + number * page_stride + head * RECORD
    records = record, record + (tl.num_programs(2) - head) * RECORD
    to = out + wide * out_batch_stride + head.to(tl.int64) * out_head_stride
    to += local.to(tl.int64) * out_page_stride
    row = tl.program_id(0) % BLOCKS * PACK_ROWS + tl.arange(0, PACK_ROWS)
    for i in tl.static_range(slices(S)):
        _unpack_slice(records, row, length, to, out_token_stride, static_scale, book, slice_of(S, i), ASM)


@triton.jit
def _unpack_slice(records, row, length, to, token_stride, static_scale, book, S: tl.constexpr, ASM: tl.constexpr):
    """Rows of containers of one slice, to the tokens and channels that they hold."""
    for c in tl.static_range(known(S.blocks)):
        words = ()
        if S.kind != "none":
            container = c * S.block + tl.arange(0, S.block)
            for w in tl.static_range(known(S.words)):
                at = S.words_offset // 2 + row[:, None] * S.row_words + w * S.width + container[None, :]
                keep = (row < S.rows)[:, None] & (container < S.width)[None, :]
                words = words + (tl.load(records[0].to(tl.pointer_type(tl.int16)) + at, mask=keep, other=0),)
            words = unpack(words, book, S, ASM)
        for f in tl.static_range(known(S.fields)):
            channel = channels_of(f % S.chunks, c, S)
            # Rows of a block of tokens lie together.
            token = row // S.unit_rows * S.unit + f // S.chunks * S.unit_rows + row % S.unit_rows
            real = (row < S.rows) & (token < length)
            keep = real[:, None] & (channel < S.first + S.head_dim)[None, :]
            x = tl.full([PACK_ROWS, S.block], 0.0, tl.float32)
            if S.kind != "none":
                x = _number(records, token, keep, real, words[f], f, c, S, ASM) * static_scale
            at = token.to(tl.int64)[:, None] * token_stride + channel[None, :]
            tl.store(to + at, x.to(to.dtype.element_ty), mask=keep)


@triton.jit
def _number(records, token, keep, real, plane, f: tl.constexpr, c: tl.constexpr, S: tl.constexpr, ASM: tl.constexpr):
    """What the codes of one field stand for, fp32 [rows, C]."""
    x = plane.to(tl.float32) - bias_of(S, f)
    if S.terms > 0:
        channel = local_channels(f % S.chunks, c, S)[None, :]
        if S.by_channel:
            group = (token // S.group)[:, None] + channel * 0
            at = group * S.head_dim + channel
        else:
            at = (token * S.groups + group_of(S, f % S.chunks, c))[:, None] + channel * 0
            group = at
        scale, minimum = load_meta(records, at, group, keep, S, True, ASM)
        x = x * scale.to(tl.float32)
        if S.terms == 2:
            x += minimum.to(tl.float32)
    if S.norm_offset >= 0:
        x = x * load_norm(records, token, real, S, True)[:, None]
    return x
