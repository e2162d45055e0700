"""Quantize and pack: rows of words and their metadata, from tokens that lie anywhere. Bulk, flush, append share this.

What goes in tuples is said in ``encode.py``. A page is packed slice by slice: lengths and scales that several tokens
share first, then rows of containers.
"""

import triton
import triton.language as tl

from kvq.kernels.device.sections import channels_of, load_norm, local_channels, slice_of, slices
from kvq.kernels.device.words import field_code, field_place, is_spread, known
from kvq.kernels.pack.encode import (
    PACK_ROWS,
    encode_groups,
    encode_tokens,
    is_normed,
    merge,
    numbers_at,
    slot_of,
    store_norms,
)
from kvq.kernels.pack.metadata import (
    clipped,
    half_bits,
    or_infinity,
    range_of_minima,
    store_meta,
    store_range8,
)


@triton.constexpr_function
def clips(E, i):
    """Whether slice i leaves out a share of its ranges."""
    return E.clips[i]


@triton.jit
def _combined(fields, S: tl.constexpr):
    """Container words (int32) of one field tensor each."""
    words = ()
    for w in tl.static_range(known(S.words)):
        words = words + (tl.zeros_like(fields[0]),)
    for f in tl.static_range(known(S.fields)):
        if is_spread(S, f):
            for w in tl.static_range(known(S.words)):
                words = merge(words, w, _either, (fields[f] >> w & 1) << 15)
        else:
            words = merge(words, field_place(S, f)[0], _either, fields[f] << field_place(S, f)[1])
    if S.kind != "e4m3" and S.bits == 4:
        words = ((words[0] << 2 | words[0] >> 14) & 0xFFFF,)
    return words


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _token_of(row, part: tl.constexpr, S: tl.constexpr):
    """The token of a page that part ``part`` of its rows of containers holds: rows of a unit lie together."""
    return row // S.unit_rows * S.unit + part * S.unit_rows + row % S.unit_rows


@triton.jit
def _pack_rows(
    tokens, span, first_row, records, limit, numbers, cut,
    S: tl.constexpr, E: tl.constexpr, CLIP: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Encode what lies in PACK_ROWS rows of a page of ``span``: (first token of the page, start, stop).

    Tokens before ``start`` that share a row keep their codes; tokens from ``stop`` on become zero.
    """
    page_token, start, stop = span
    row = first_row + tl.arange(0, PACK_ROWS)
    codes = ()
    touched = row < 0
    for part in tl.static_range(known(S.parts)):
        inside = _token_of(row, part, S)
        token = page_token + inside
        real = (row < S.rows) & (token >= start) & (token < stop)
        slot = slot_of(tokens, token, real)
        if S.by_channel:
            codes = codes + encode_groups(tokens, records, slot, inside, real, numbers, S, E)
        else:
            codes = codes + encode_tokens(tokens, records, slot, inside, real, limit, numbers, S, E, CLIP, cut, LIMIT)
        touched = touched | real
    for c in tl.static_range(known(S.blocks)):
        container = c * S.block + tl.arange(0, S.block)
        at = records[0].to(tl.pointer_type(tl.int16)) + (
            S.words_offset // 2 + row[:, None] * S.row_words + container[None, :]
        )
        keep = touched[:, None] & (container < S.width)[None, :]
        fields = ()
        old = ()
        if S.parts > 1:
            for w in tl.static_range(known(S.words)):
                old = old + (tl.load(at + w * S.width, mask=keep, other=0).to(tl.int32) & 0xFFFF,)
        for f in tl.static_range(known(S.fields)):
            code = codes[f * S.blocks + c]
            if S.parts > 1:
                token = (page_token + _token_of(row, f // S.chunks, S))[:, None]
                code = tl.where(token < start, field_code(old, f, S), tl.where(token < stop, code, 0))
            fields = fields + (code,)
        words = _combined(fields, S)
        for w in tl.static_range(known(S.words)):
            tl.store(at + w * S.width, words[w].to(tl.int16), mask=keep)


@triton.jit
def _store_page_norms(tokens, span, records, S: tl.constexpr):
    """Norms of the page's tokens that lie in a range."""
    page_token, start, stop = span
    for first in range(0, S.page_tokens, PACK_ROWS):
        inside = first + tl.arange(0, PACK_ROWS)
        token = page_token + inside
        real = (inside < S.page_tokens) & (token >= start) & (token < stop)
        store_norms(tokens, records, token, inside, real, S)


@triton.jit
def _ends_of_group(tokens, page_token, group, records, channel, S: tl.constexpr):
    """(lowest, highest, NaN if one is NaN or infinite) of channels [C] over a token group of the page."""
    low = tl.full([PACK_ROWS, S.block], float("inf"), tl.float32)
    high = tl.full([PACK_ROWS, S.block], float("-inf"), tl.float32)
    poison = tl.full([PACK_ROWS, S.block], 0.0, tl.float32)
    # Rows are compared one by one; only the last step crosses threads.
    for t in range(0, S.group, PACK_ROWS):
        own = t + tl.arange(0, PACK_ROWS)
        real = own < S.group
        inside = group * S.group + own
        value = numbers_at(tokens, tokens[1], slot_of(tokens, page_token + inside, real), real, channel, S)
        if is_normed(S):
            value = tl.div_rn(value, or_infinity(load_norm(records, inside, real, S, True))[:, None])
        low = tl.where(real[:, None], tl.minimum(low, value), low)
        high = tl.where(real[:, None], tl.maximum(high, value), high)
        poison += value * 0.0
    return tl.min(low, 0), tl.max(high, 0), tl.sum(poison, 0)


@triton.jit
def _store_group_meta(
    tokens, span, records, numbers, cut, S: tl.constexpr, E: tl.constexpr, CLIP: tl.constexpr
):  # fmt: skip
    """Metadata of the page's token groups that lie in a range, axis channel."""
    page_token, start, stop = span
    first = tl.maximum(start - page_token, 0) // S.group
    last = tl.minimum(stop - page_token, S.page_tokens) // S.group
    for group in range(first, last):
        ends = ()
        for chunk in tl.static_range(known(S.chunks)):
            for c in tl.static_range(known(S.blocks)):
                channel = channels_of(chunk, c, S)
                low, high, poison = _ends_of_group(tokens, page_token, group, records, channel, S)
                if S.meta == "range8":
                    low, high = clipped(tl.where(poison != poison, float("nan"), low), high, cut, CLIP)
                    ends = ends + ((low, high),)
                else:
                    local = local_channels(chunk, c, S)
                    store_meta(
                        records[0], group * S.head_dim + local, local < S.head_dim,
                        low, high, poison, cut, numbers[3], S, E, CLIP,
                    )  # fmt: skip
        if S.meta == "range8":
            _store_relative(records, group, ends, S)


@triton.jit
def _store_relative(records, group, ends, S: tl.constexpr):
    """range8: the range of the minima of all channels of a slice, then every channel's pair."""
    least = tl.min(ends[0][0], 0)
    most = tl.max(ends[0][0], 0)
    poison = tl.sum(ends[0][0] * 0.0, 0)
    for i in tl.static_range(1, known(S.chunks * S.blocks)):
        least = tl.minimum(least, tl.min(ends[i][0], 0))
        most = tl.maximum(most, tl.max(ends[i][0], 0))
        poison += tl.sum(ends[i][0] * 0.0, 0)
    start, step = range_of_minima(tl.where(poison != poison, float("nan"), least), most)
    at = records[0].to(tl.pointer_type(tl.int32)) + (S.range_offset // 4 + group)
    tl.store(at, half_bits(start) | half_bits(step) << 16)
    for chunk in tl.static_range(known(S.chunks)):
        for c in tl.static_range(known(S.blocks)):
            local = local_channels(chunk, c, S)
            low, high = ends[chunk * S.blocks + c]
            store_range8(records[0], group * S.head_dim + local, local < S.head_dim, low, high, start, step, S)


@triton.jit
def pack_page(tokens, span, records, limit, numbers, S: tl.constexpr, E: tl.constexpr, LIMIT: tl.constexpr):
    """Quantize tokens [start, stop) of one KV head into a page; ``span``: (first token of the page, start, stop)."""
    page_token, start, stop = span
    first = tl.maximum(start, page_token)
    last = tl.minimum(stop, page_token + S.page_tokens)
    if first < last:
        for i in tl.static_range(slices(S)):
            if slice_of(S, i).kind != "none" and slice_of(S, i).by_channel:
                if is_normed(slice_of(S, i)):
                    _store_page_norms(tokens, span, records, slice_of(S, i))
                    tl.debug_barrier()
                _store_group_meta(tokens, span, records, numbers, numbers[0][i], slice_of(S, i), E, clips(E, i))
        if S.by_channel:
            tl.debug_barrier()
        for i in tl.static_range(slices(S)):
            if slice_of(S, i).kind != "none":
                _pack_slice(
                    tokens, span, first - page_token, last - page_token, records, limit, numbers, numbers[0][i],
                    slice_of(S, i), E, clips(E, i), LIMIT,
                )  # fmt: skip


@triton.jit
def _pack_slice(
    tokens, span, first, last, records, limit, numbers, cut,
    S: tl.constexpr, E: tl.constexpr, CLIP: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """The rows of containers that tokens [first, last) of the page lie in."""
    from_row = 0
    to_row = S.rows
    if S.unit < S.page_tokens:
        from_row = first // S.unit * S.unit_rows
        to_row = tl.cdiv(last, S.unit) * S.unit_rows
    elif S.parts == 1 or last - first == 1:
        from_row = first % S.rows
        to_row = (last - 1) % S.rows + 1
    for chunk in range(from_row // PACK_ROWS, tl.cdiv(to_row, PACK_ROWS)):
        _pack_rows(tokens, span, chunk * PACK_ROWS, records, limit, numbers, cut, S, E, CLIP, LIMIT)


@triton.jit(do_not_specialize=["capacity", "table_stride"])
def pack_tokens(
    x,
    pool,
    table,
    ranges,
    offsets,
    limits,
    x_batch_stride,
    x_head_stride,
    x_token_stride,
    capacity,
    table_stride,
    page_stride,
    numbers,
    S: tl.constexpr,
    E: tl.constexpr,
    RECORD: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """Grid (pages that a range can touch, B, KV heads): quantize and pack one side.

    x         [B, KV heads, capacity, head_dim] by strides; token t is at ``(t + offsets[b]) % capacity``.
    ranges    [B, 2] int32: tokens [start, stop) to pack, in whole groups for axis channel. offsets [B] int32.
    limits    [KV heads] fp32: raised to the largest scale stored, norms included, if LIMIT (scales by token).
    """
    sequence = tl.program_id(1)
    head = tl.program_id(2)
    start = tl.load(ranges + sequence * 2)
    stop = tl.load(ranges + sequence * 2 + 1)
    page = start // S.page_tokens + tl.program_id(0)
    if page * S.page_tokens >= stop or stop <= start:
        return
    # 64 bits: sequences and heads of a long prompt lie more than 2^31 numbers apart.
    wide = sequence.to(tl.int64)
    base = pool + tl.load(table + wide * table_stride + page).to(tl.int64) * page_stride
    heads = tl.num_programs(2)
    own = x + wide * x_batch_stride
    tokens = own, head, heads, x_head_stride, x_token_stride, tl.load(offsets + sequence), capacity
    records = base + head * RECORD, base + heads * RECORD
    pack_page(tokens, (page * S.page_tokens, start, stop), records, limits + head, numbers, S, E, LIMIT)
