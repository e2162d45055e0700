"""Quantize and pack: rows of words and their scales, from tokens that lie anywhere. Bulk, flush and append share this.

The arithmetic is fp32, every operation rounds as IEEE says and none is fused, so that the bytes do not depend on how
many tokens come at a time, nor on the device.
"""

import triton
import triton.language as tl

from kvq.kernels.device.sections import channels_of, group_of
from kvq.kernels.device.words import field_code, field_place, is_spread, known
from kvq.pages.layout import E4M3_MAX

# Adding and subtracting 1.5 * 2^23 rounds a small number to the nearest integer, halves to even.
_ROUND = tl.constexpr(12582912.0)
# Rows of containers handled at a time.
PACK_ROWS = tl.constexpr(16)
_LARGEST_E4M3 = tl.constexpr(E4M3_MAX)


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


@triton.constexpr_function
def _steps(S):
    return float(2**S.bits - 1)


@triton.jit
def _numbers(x, slot, real, channel, S: tl.constexpr):
    """Numbers [R, C] to quantize, fp32: tokens at ``slot`` [R]."""
    keep = real[:, None] & (channel < S.head_dim)[None, :]
    return tl.load(x + slot[:, None] + channel[None, :], mask=keep, other=0.0).to(tl.float32)


@triton.jit
def _grid_of(low, high, poison, clip_cut, S: tl.constexpr, CLIP: tl.constexpr):
    """(scale, minimum) fp16 of groups with these ends; NaN where a number was NaN or infinite."""
    if CLIP:
        cut = (high - low) * clip_cut
        low, high = low + cut, high - cut
    scale = tl.div_rn(high - low, _steps(S))
    bad = poison != poison
    return tl.where(bad, float("nan"), scale).to(tl.float16), tl.where(bad, float("nan"), low).to(tl.float16)


@triton.jit
def _codes(x, scale, minimum, S: tl.constexpr):
    """Codes of x under fp16 scales and minima, int32; a constant group has scale 0 and codes 0."""
    scale = scale.to(tl.float32)
    code = rounded(tl.div_rn(x - minimum.to(tl.float32), tl.where(scale == 0.0, 1.0, scale)))
    return tl.where(scale == 0.0, 0.0, tl.minimum(tl.maximum(code, 0.0), _steps(S))).to(tl.int32)


@triton.jit
def _pair_bits(scale, minimum):
    low = scale.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return low | minimum.to(tl.int16, bitcast=True).to(tl.int32) << 16


@triton.jit
def _merge(values, i: tl.constexpr, combine: tl.constexpr, value):
    """The tuple with entry i combined with a value."""
    return values[:i] + (combine(values[i], value),) + values[i + 1 :]


@triton.jit
def _encode_part(
    x,
    slot,
    real,
    record,
    token,
    limit,
    clip_cut,
    static_scale,
    S: tl.constexpr,
    CLIP: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """Codes of one part of some rows, by chunk and block; stores scales and minima of axis token."""
    numbers = ()
    for chunk in tl.static_range(known(S.chunks)):
        for c in tl.static_range(known(S.blocks)):
            numbers = numbers + (_numbers(x, slot, real, channels_of(chunk, c, S), S),)
    codes = ()
    pairs = record.to(tl.pointer_type(tl.int32)) + S.meta_offset // 4
    if S.kind == "e4m3":
        for i in tl.static_range(known(S.chunks * S.blocks)):
            codes = codes + (to_e4m3(tl.div_rn(numbers[i], static_scale)),)
    elif S.by_channel:
        halves = record.to(tl.pointer_type(tl.float16)) + S.meta_offset // 2
        for chunk in tl.static_range(known(S.chunks)):
            for c in tl.static_range(known(S.blocks)):
                at = 2 * ((token // S.group * S.head_dim)[:, None] + channels_of(chunk, c, S)[None, :])
                scale = tl.load(halves + at, mask=real[:, None], other=0.0)
                minimum = tl.load(halves + at + 1, mask=real[:, None], other=0.0)
                codes = codes + (_codes(numbers[chunk * S.blocks + c], scale, minimum, S),)
    else:
        lows = ()
        highs = ()
        poisons = ()
        for g in tl.static_range(known(S.groups)):
            lows = lows + (tl.full([PACK_ROWS], float("inf"), tl.float32),)
            highs = highs + (tl.full([PACK_ROWS], float("-inf"), tl.float32),)
            poisons = poisons + (tl.full([PACK_ROWS], 0.0, tl.float32),)
        for chunk in tl.static_range(known(S.chunks)):
            for c in tl.static_range(known(S.blocks)):
                own = numbers[chunk * S.blocks + c]
                lows = _merge(lows, group_of(S, chunk, c), _smaller, tl.min(own, 1))
                highs = _merge(highs, group_of(S, chunk, c), _larger, tl.max(own, 1))
                poisons = _merge(poisons, group_of(S, chunk, c), _plus, tl.sum(own * 0.0, 1))
        scales = ()
        minima = ()
        for g in tl.static_range(known(S.groups)):
            scale, minimum = _grid_of(lows[g], highs[g], poisons[g], clip_cut, S, CLIP)
            tl.store(pairs + token * S.groups + g, _pair_bits(scale, minimum), mask=real)
            if LIMIT:
                tl.atomic_max(limit, tl.max(tl.where(real, scale.to(tl.float32), 0.0), 0))
            scales = scales + (scale[:, None],)
            minima = minima + (minimum[:, None],)
        for chunk in tl.static_range(known(S.chunks)):
            for c in tl.static_range(known(S.blocks)):
                own = _codes(
                    numbers[chunk * S.blocks + c], scales[group_of(S, chunk, c)], minima[group_of(S, chunk, c)], S
                )
                codes = codes + (own,)
    return codes


@triton.jit
def _plus(a, b):
    return a + b


# tl.minimum itself cannot be a compile-time argument before Triton 3.7.
@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _combined(fields, S: tl.constexpr):
    """Container words (int32) of one field tensor each."""
    words = ()
    for w in tl.static_range(known(S.words)):
        words = words + (tl.zeros_like(fields[0]),)
    for f in tl.static_range(known(S.fields)):
        if is_spread(S, f):
            for w in tl.static_range(known(S.words)):
                words = _merge(words, w, _either, (fields[f] >> w & 1) << 15)
        else:
            words = _merge(words, field_place(S, f)[0], _either, fields[f] << field_place(S, f)[1])
    if S.kind != "e4m3" and S.bits == 4:
        words = ((words[0] << 2 | words[0] >> 14) & 0xFFFF,)
    return words


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _pack_rows(
    x,
    first_row,
    page_token,
    start,
    stop,
    offset,
    capacity,
    token_stride,
    record,
    limit,
    clip_cut,
    static_scale,
    S: tl.constexpr,
    CLIP: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """Encode tokens [start, stop) that lie in PACK_ROWS rows of a page, whose first token is ``page_token``.

    Tokens before ``start`` that share a row keep their codes; tokens from ``stop`` on become zero.
    """
    row = first_row + tl.arange(0, PACK_ROWS)
    codes = ()
    touched = row < 0
    for part in tl.static_range(known(S.parts)):
        inside = part * S.rows + row
        token = page_token + inside
        real = (row < S.rows) & (token >= start) & (token < stop)
        slot = tl.where(real, (token + offset) % capacity, 0).to(tl.int64) * token_stride
        codes = codes + _encode_part(
            x,
            slot,
            real,
            record,
            inside,
            limit,
            clip_cut,
            static_scale,
            S,
            CLIP,
            LIMIT,
        )
        touched = touched | real
    for c in tl.static_range(known(S.blocks)):
        container = c * S.block + tl.arange(0, S.block)
        at = record.to(tl.pointer_type(tl.int16)) + (
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
                token = (page_token + f // S.chunks * S.rows + row)[:, None]
                code = tl.where(token < start, field_code(old, f, S), tl.where(token < stop, code, 0))
            fields = fields + (code,)
        words = _combined(fields, S)
        for w in tl.static_range(known(S.words)):
            tl.store(at + w * S.width, words[w].to(tl.int16), mask=keep)


@triton.jit
def _store_channel_grids(
    x,
    page_token,
    start,
    stop,
    offset,
    capacity,
    token_stride,
    record,
    clip_cut,
    S: tl.constexpr,
    CLIP: tl.constexpr,
):
    """Scales and minima of the page's token groups that lie in [start, stop), axis channel."""
    pairs = record.to(tl.pointer_type(tl.int32)) + S.meta_offset // 4
    first = tl.maximum(start - page_token, 0) // S.group
    last = tl.minimum(stop - page_token, S.page_tokens) // S.group
    for g in range(first, last):
        for chunk in tl.static_range(known(S.chunks)):
            for c in tl.static_range(known(S.blocks)):
                channel = channels_of(chunk, c, S)
                low = tl.full([PACK_ROWS, S.block], float("inf"), tl.float32)
                high = tl.full([PACK_ROWS, S.block], float("-inf"), tl.float32)
                poison = tl.full([PACK_ROWS, S.block], 0.0, tl.float32)
                # Rows are compared one by one; only the last step crosses threads.
                for t in range(0, S.group, PACK_ROWS):
                    own = t + tl.arange(0, PACK_ROWS)
                    token = page_token + g * S.group + own
                    real = own < S.group
                    slot = ((token + offset) % capacity).to(tl.int64) * token_stride
                    value = _numbers(x, slot, real, channel, S)
                    low = tl.where(real[:, None], tl.minimum(low, value), low)
                    high = tl.where(real[:, None], tl.maximum(high, value), high)
                    poison += value * 0.0
                scale, minimum = _grid_of(tl.min(low, 0), tl.max(high, 0), tl.sum(poison, 0), clip_cut, S, CLIP)
                at = pairs + g * S.head_dim + channel
                tl.store(at, _pair_bits(scale, minimum), mask=channel < S.head_dim)


@triton.jit
def pack_page(
    x,
    page_token,
    start,
    stop,
    offset,
    capacity,
    token_stride,
    record,
    limit,
    clip_cut,
    static_scale,
    S: tl.constexpr,
    CLIP: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """Quantize tokens [start, stop) of one KV head into the page whose first token is ``page_token``."""
    first = tl.maximum(start, page_token)
    last = tl.minimum(stop, page_token + S.page_tokens)
    if first < last:
        if S.by_channel:
            _store_channel_grids(
                x,
                page_token,
                start,
                stop,
                offset,
                capacity,
                token_stride,
                record,
                clip_cut,
                S,
                CLIP,
            )
            tl.debug_barrier()
        from_row = 0
        to_row = S.rows
        if S.parts == 1 or last - first == 1:
            from_row = (first - page_token) % S.rows
            to_row = (last - 1 - page_token) % S.rows + 1
        for chunk in range(from_row // PACK_ROWS, tl.cdiv(to_row, PACK_ROWS)):
            _pack_rows(
                x,
                chunk * PACK_ROWS,
                page_token,
                start,
                stop,
                offset,
                capacity,
                token_stride,
                record,
                limit,
                clip_cut,
                static_scale,
                S,
                CLIP,
                LIMIT,
            )


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
    clip_cut,
    static_scale,
    S: tl.constexpr,
    RECORD: tl.constexpr,
    CLIP: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """Grid (pages that a range can touch, B, KV heads): quantize and pack one side.

    x         [B, KV heads, capacity, head_dim] by strides; token t is at ``(t + offsets[b]) % capacity``.
    ranges    [B, 2] int32: tokens [start, stop) to pack, in whole groups for axis channel. offsets [B] int32.
    limits    [KV heads] fp32: raised to the largest scale stored, if LIMIT (axis token).
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
    number = tl.load(table + wide * table_stride + page).to(tl.int64)
    record = pool + number * page_stride + head * RECORD
    pack_page(
        x + wide * x_batch_stride + head.to(tl.int64) * x_head_stride,
        page * S.page_tokens,
        start,
        stop,
        tl.load(offsets + sequence),
        capacity,
        x_token_stride,
        record,
        limits + head,
        clip_cut,
        static_scale,
        S,
        CLIP,
        LIMIT,
    )
