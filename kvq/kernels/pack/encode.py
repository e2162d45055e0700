"""Numbers to codes on the device: tokens' lengths, the metadata of their groups, and which code stands for a number.

Arguments that go together are tuples:

    tokens   (x, head, heads, head_stride, token_stride, offset, capacity): token t of head h is at
             ``x + h * head_stride + (t + offset) % capacity * token_stride``
    records  (the head's record of a page, the one that heads share)
    numbers  (by slice, the share of a range left out at each end; edges; levels; the static scale of a side), of a
             ``kvq.pages.view.View``

``S`` is a side or a slice of it (``geometry.Side``), ``E`` how its codes are chosen (``pack.launch.Encoding``).
"""

import triton
import triton.language as tl

from kvq.kernels.device.sections import channels_of, group_of, load_meta, load_norm, local_channels
from kvq.kernels.device.words import known
from kvq.kernels.pack.metadata import or_infinity, rounded, steps_of, store_meta, symmetric_minimum, to_e4m3

# Rows of containers handled at a time.
PACK_ROWS = tl.constexpr(16)


@triton.constexpr_function
def edge_count(S, E):
    return 7 if E.encoding == "e2m1" else 2**S.bits - 1


@triton.constexpr_function
def is_normed(S):
    return S.norm_offset >= 0


@triton.constexpr_function
def has_edges(E):
    return E.encoding in ("unit", "absmax", "range", "e2m1")


@triton.jit
def slot_of(tokens, token, real):
    """Where tokens lie in x, numbers from the head's first; that of token 0 where they are not real."""
    return tl.where(real, (token + tokens[5]) % tokens[6], 0).to(tl.int64) * tokens[4]


@triton.jit
def numbers_at(tokens, head, slot, real, channel, S: tl.constexpr):
    """Numbers [R, C] to quantize, fp32: tokens at ``slot`` [R] of a head."""
    keep = real[:, None] & (channel < S.first + S.head_dim)[None, :]
    x = tokens[0] + tl.cast(head, tl.int64) * tokens[3]
    return tl.load(x + slot[:, None] + channel[None, :], mask=keep, other=0.0).to(tl.float32)


@triton.jit
def _numbers(tokens, head, slot, real, S: tl.constexpr):
    """All numbers of some tokens of a head, by chunk and block."""
    found = ()
    for chunk in tl.static_range(known(S.chunks)):
        for c in tl.static_range(known(S.blocks)):
            found = found + (numbers_at(tokens, head, slot, real, channels_of(chunk, c, S), S),)
    return found


@triton.jit
def _sum_of_squares(numbers, S: tl.constexpr):
    """Of every token, [R] fp64: in no order would the sum be another."""
    total = tl.zeros([PACK_ROWS], tl.float64)
    for i in tl.static_range(known(S.chunks * S.blocks)):
        total += tl.sum((numbers[i] * numbers[i]).to(tl.float64), 1)
    return total


@triton.jit
def _mean(total, tokens, S: tl.constexpr):
    """The mean over a vector, of a head's token or of all heads', as fp32."""
    count = tokens[2] * S.head_dim if S.norm_shared else S.head_dim
    return (total / tl.cast(count, tl.float64)).to(tl.float32)


@triton.jit
def sizes_of(tokens, numbers, slot, real, S: tl.constexpr):
    """Lengths [R] fp32 of the tokens that a head's ``numbers`` belong to, or of all heads' where they share them."""
    total = tl.zeros([PACK_ROWS], tl.float64)
    if S.norm_shared:
        for head in range(0, tokens[2]):
            total += _sum_of_squares(_numbers(tokens, head, slot, real, S), S)
    else:
        total += _sum_of_squares(numbers, S)
    return tl.sqrt_rn(_mean(total, tokens, S))


@triton.jit
def store_norms(tokens, records, token, inside, real, S: tl.constexpr):
    """Lengths of tokens as they are, where codes are made with the stored ones. Heads that share them all write them:
    each reads what it has written itself."""
    slot = slot_of(tokens, token, real)
    size = sizes_of(tokens, _numbers(tokens, tokens[1], slot, real, S), slot, real, S)
    _store_norm(records, inside, real, size, S)


@triton.jit
def _by_first_head(tokens, real):
    """What heads share, one of them stores."""
    return real & (tl.full([PACK_ROWS], 0, tl.int32) == tokens[1])


@triton.jit
def _store_norm(records, inside, keep, norm, S: tl.constexpr):
    record = records[1] if S.norm_shared else records[0]
    tl.store(record.to(tl.pointer_type(tl.float16)) + (S.norm_offset // 2 + inside), norm.to(tl.float16), mask=keep)


@triton.jit
def _unit_numbers(tokens, head, slot, real, S: tl.constexpr, E: tl.constexpr):
    """(numbers, the same over the tokens' lengths, lengths [R]) of a head; a length that is stored as it is, is rounded
    first. Without norms, the numbers twice and lengths of 1."""
    numbers = _numbers(tokens, head, slot, real, S)
    size = tl.full([PACK_ROWS], 1.0, tl.float32)
    unit = numbers
    if is_normed(S):
        size = sizes_of(tokens, numbers, slot, real, S)
        if E.correct is None:
            size = size.to(tl.float16).to(tl.float32)
        divisor = or_infinity(size)[:, None]
        unit = ()
        for i in tl.static_range(known(S.chunks * S.blocks)):
            unit = unit + (tl.div_rn(numbers[i], divisor),)
    return numbers, unit, size


@triton.jit
def named(ratio, numbers, S: tl.constexpr, E: tl.constexpr):
    """Codes (int32) of numbers that scale and minimum were taken out of."""
    if has_edges(E):
        magnitude = tl.abs(ratio) if E.encoding == "e2m1" else ratio
        code = tl.zeros_like(ratio).to(tl.int32)
        if E.encoding == "e2m1":
            code += ratio.to(tl.int32, bitcast=True) >> 28 & 8
        for e in tl.static_range(known(edge_count(S, E))):
            # A number on an edge has the lower code; those of E2M1 the even one.
            if E.encoding == "e2m1" and e % 2 == 1:
                code += (numbers[1][e] <= magnitude).to(tl.int32)
            else:
                code += (numbers[1][e] < magnitude).to(tl.int32)
        return code
    else:
        return rounded(tl.minimum(tl.maximum(ratio, 0.0), steps_of(S))).to(tl.int32)


@triton.jit
def codes_of(x, scale, minimum, numbers, S: tl.constexpr, E: tl.constexpr):
    """Codes of x under scales and minima; a group of scale 0 has the code of 0."""
    return named(tl.div_rn(x - minimum, or_infinity(scale)), numbers, S, E)


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
def merge(values, i: tl.constexpr, combine: tl.constexpr, value):
    """The tuple with entry i combined with a value."""
    return values[:i] + (combine(values[i], value),) + values[i + 1 :]


@triton.jit
def _ends(numbers, S: tl.constexpr):
    """(lowest, highest, NaN if one is NaN or infinite) of the groups of tokens, each a tuple of [R]."""
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
            lows = merge(lows, group_of(S, chunk, c), _smaller, tl.min(own, 1))
            highs = merge(highs, group_of(S, chunk, c), _larger, tl.max(own, 1))
            poisons = merge(poisons, group_of(S, chunk, c), _plus, tl.sum(own * 0.0, 1))
    return lows, highs, poisons


@triton.jit
def _shared_ends(tokens, slot, real, S: tl.constexpr, E: tl.constexpr):
    """The same of one group that is all heads' numbers of a token."""
    low = tl.full([PACK_ROWS], float("inf"), tl.float32)
    high = tl.full([PACK_ROWS], float("-inf"), tl.float32)
    poison = tl.full([PACK_ROWS], 0.0, tl.float32)
    for head in range(0, tokens[2]):
        lows, highs, poisons = _ends(_unit_numbers(tokens, head, slot, real, S, E)[1], S)
        low, high, poison = tl.minimum(low, lows[0]), tl.maximum(high, highs[0]), poison + poisons[0]
    return (low,), (high,), (poison,)


@triton.jit
def encode_tokens(
    tokens, records, slot, inside, real, limit, numbers,
    S: tl.constexpr, E: tl.constexpr, CLIP: tl.constexpr, cut, LIMIT: tl.constexpr,
):  # fmt: skip
    """Codes of tokens at ``slot`` [R], whose numbers are ``inside`` a page, by chunk and block; stores what is theirs
    alone: metadata of axis token, and norms."""
    head = tokens[1]
    raw, unit, size = _unit_numbers(tokens, head, slot, real, S, E)
    scales = (tl.full([PACK_ROWS], 1.0, tl.float32),)
    minima = (tl.full([PACK_ROWS], 0.0, tl.float32),)
    if S.terms > 0:
        if S.meta_shared:
            lows, highs, poisons = _shared_ends(tokens, slot, real, S, E)
            record = records[1]
            keep = _by_first_head(tokens, real)
        else:
            lows, highs, poisons = _ends(unit, S)
            record = records[0]
            keep = real
        scales = ()
        minima = ()
        for g in tl.static_range(known(S.groups)):
            scale, minimum = store_meta(
                record, inside * S.groups + g, keep, lows[g], highs[g], poisons[g], cut, numbers[3], S, E, CLIP
            )
            scales = scales + (scale,)
            minima = minima + (minimum,)
    codes = ()
    for chunk in tl.static_range(known(S.chunks)):
        for c in tl.static_range(known(S.blocks)):
            own = unit[chunk * S.blocks + c]
            if E.encoding == "cast":
                codes = codes + (to_e4m3(tl.div_rn(own, numbers[3])),)
            elif S.terms == 0:
                codes = codes + (named(own, numbers, S, E),)
            else:
                scale = scales[group_of(S, chunk, c)][:, None]
                minimum = minima[group_of(S, chunk, c)][:, None]
                codes = codes + (codes_of(own, scale, minimum, numbers, S, E),)
    norm = size
    if is_normed(S):
        if E.correct is not None:
            norm = _corrected(tokens, slot, real, raw, codes, size, numbers, S, E)
        _store_norm(records, inside, _by_first_head(tokens, real) if S.norm_shared else real, norm, S)
        norm = norm.to(tl.float16).to(tl.float32)
    if LIMIT:
        for g in tl.static_range(known(S.groups)):
            bound = scales[g] * norm
            tl.atomic_max(limit, tl.max(tl.where(real & (bound == bound), bound, 0.0), 0))
    return codes


@triton.jit
def _products(numbers, codes, book, S: tl.constexpr):
    """Sums over a token of level^2 and of number * level, [R] fp64 each; ``book``: the levels."""
    energy = tl.zeros([PACK_ROWS], tl.float64)
    product = tl.zeros([PACK_ROWS], tl.float64)
    for i in tl.static_range(known(S.chunks * S.blocks)):
        level = tl.zeros_like(numbers[i])
        for n in tl.static_range(known(2**S.bits)):
            level = tl.where(codes[i] == n, book[n], level)
        energy += tl.sum((level * level).to(tl.float64), 1)
        product += tl.sum((numbers[i] * level).to(tl.float64), 1)
    return energy, product


@triton.jit
def _corrected(tokens, slot, real, raw, codes, size, numbers, S: tl.constexpr, E: tl.constexpr):
    """The lengths [R] that give decoded tokens the length of the exact ones, or bring them nearest to those."""
    if S.norm_shared:
        energy = tl.zeros([PACK_ROWS], tl.float64)
        product = tl.zeros([PACK_ROWS], tl.float64)
        for head in range(0, tokens[2]):
            other, unit, _ = _unit_numbers(tokens, head, slot, real, S, E)
            found = ()
            for i in tl.static_range(known(S.chunks * S.blocks)):
                found = found + (named(unit[i], numbers, S, E),)
            more, along = _products(other, found, numbers[2], S)
            energy += more
            product += along
    else:
        energy, product = _products(raw, codes, numbers[2], S)
    energy = _mean(energy, tokens, S)
    if E.correct == "least_squares":
        wanted = _mean(product, tokens, S)
    else:
        wanted = size * tl.sqrt_rn(energy)
    return tl.where(energy == 0.0, 0.0, tl.div_rn(wanted, or_infinity(energy)))


@triton.jit
def encode_groups(tokens, records, slot, inside, real, numbers, S: tl.constexpr, E: tl.constexpr):
    """Codes of tokens whose metadata are those of token groups, which are stored, as are norms."""
    size = tl.full([PACK_ROWS], 1.0, tl.float32)
    if is_normed(S):
        size = or_infinity(load_norm(records, inside, real, S, True))
    codes = ()
    for chunk in tl.static_range(known(S.chunks)):
        for c in tl.static_range(known(S.blocks)):
            own = numbers_at(tokens, tokens[1], slot, real, channels_of(chunk, c, S), S)
            if is_normed(S):
                own = tl.div_rn(own, size[:, None])
            channel = local_channels(chunk, c, S)[None, :]
            group = (inside // S.group)[:, None] + channel * 0
            at = group * S.head_dim + channel
            scale, minimum = load_meta(records, at, group, real[:, None], S, True, 0)
            scale = scale.to(tl.float32)
            minimum = scale * symmetric_minimum(S) if S.terms == 1 else minimum.to(tl.float32)
            codes = codes + (codes_of(own, scale, minimum, numbers, S, E),)
    return codes
