"""Codes to 16-bit words and back, in torch. The layout is ``SideLayout`` of layout.py; tests hold it to a slow oracle.

``pack_codes`` and ``unpack_codes`` work on whole pages, ``merge_codes`` writes into a page that is filled in part,
``pack_rows`` and ``unpack_rows`` work on whole rows of a page; ``float_tile`` is the fast form for attention.
"""

from functools import lru_cache

import torch
from torch import Tensor

from kvq.pages.layout import CONTAINER_WORDS, FIELDS, PLANE_FORMATS, SideLayout
from kvq.shapes import Int16, UInt8, checked


def pack_codes(codes: torch.Tensor, layout: SideLayout) -> torch.Tensor:
    """Codes [..., P * page_tokens, head_dim] (uint8) to words [..., P, *layout.words_shape]."""
    lead = codes.shape[:-2]
    if layout.format not in PLANE_FORMATS:
        return codes.reshape(*lead, codes.shape[-2] // layout.page_tokens, *layout.words_shape)
    codes = codes.reshape(*lead, -1, layout.parts, layout.rows, layout.head_dim)
    return pack_rows(codes, layout)


def unpack_codes(words: torch.Tensor, layout: SideLayout) -> torch.Tensor:
    """Inverse of ``pack_codes``; in format ``sections`` the last dimension is empty."""
    if layout.format not in PLANE_FORMATS:
        return words.flatten(-3, -2)
    codes = unpack_rows(words, layout)
    return codes.reshape(*codes.shape[:-4], -1, layout.head_dim)


def merge_codes(words: torch.Tensor, layout: SideLayout, start: int, codes: torch.Tensor) -> None:
    """Merge codes [..., t, head_dim] of tokens from ``start`` into pages' words [..., rows, container words, width].

    Rows of containers that hold none of these tokens stay. In the others the tokens before ``start`` stay, and what
    follows the last one written becomes zero.
    """
    lead, count = codes.shape[:-2], codes.shape[-2]
    part, row = divmod(start, layout.rows)
    if row + count <= layout.rows:
        # The tokens lie in one part, each in a row of its own.
        frame = codes.new_zeros(*lead, layout.parts, count, layout.head_dim)
        frame[..., part, :, :] = codes
        keep = kept_bits(layout, part, words.device)
        target = words.narrow(-3, row, count)
    else:
        frame = codes.new_zeros(*lead, layout.page_tokens, layout.head_dim)
        frame[..., start : start + count, :] = codes
        frame = frame.view(*lead, layout.parts, layout.rows, layout.head_dim)
        before = torch.arange(layout.page_tokens, device=words.device) < start
        keep = _bits_of(layout, before.view(layout.parts, layout.rows))
        if count < layout.rows:
            # Two parts are touched, the end of one and the beginning of the next: the rows between stay whole.
            keep[(row + count) % layout.rows : row] = -1
        target = words
    packed = pack_rows(frame, layout)
    target.copy_(packed if keep is None else (target & keep) | packed)


@lru_cache(maxsize=1024)
def kept_bits(layout: SideLayout, parts: int, device: torch.device) -> torch.Tensor | None:
    """Which bits of a row belong to its first ``parts`` tokens, int16 [1, container words, width]; None for none."""
    if parts == 0:
        return None
    return _bits_of(layout, torch.arange(layout.parts, device=device).unsqueeze(1) < parts)


def _bits_of(layout: SideLayout, tokens: torch.Tensor) -> torch.Tensor:
    """The bits of tokens [parts, rows] (bool) in words, int16 [rows, container words, width]."""
    ones = tokens.to(torch.uint8) * ((1 << layout.bits) - 1)
    return pack_rows(ones.unsqueeze(-1).expand(-1, -1, layout.head_dim).contiguous(), layout)


@checked
def pack_rows(
    codes: UInt8[Tensor, "*lead parts rows head_dim"], layout: SideLayout
) -> Int16[Tensor, "*lead rows words width"]:
    """Pack codes [..., parts, rows, head_dim] (uint8) into words [..., rows, container words, width] (int16).

    ``rows`` may be any number of rows; part p of row r is token ``p * layout.rows + r`` of the page.
    """
    lead, rows = codes.shape[:-3], codes.shape[-2]
    fields = codes.view(*lead, layout.parts, rows, layout.chunks, layout.width).movedim(-2, -3)
    fields = fields.reshape(*lead, FIELDS[layout.bits], rows, layout.width).to(torch.int32)
    field = [fields[..., f, :, :] for f in range(FIELDS[layout.bits])]
    words = [_pack_word(field, word, layout.bits) for word in range(CONTAINER_WORDS[layout.bits])]
    return torch.stack(words, dim=-2).to(torch.int16)


def _pack_word(field: list[torch.Tensor], word: int, bits: int) -> torch.Tensor:
    if bits == 3:
        packed = (field[15] >> word & 1) << 15
        for k in range(5):
            packed = packed | field[5 * word + k] << 3 * k
        return packed
    packed = field[0]
    for f in range(1, len(field)):
        packed = packed | field[f] << bits * f
    if bits == 4:
        packed = packed << 2 | packed >> 14
    return packed


@checked
def unpack_rows(
    words: Int16[Tensor, "*lead rows words width"], layout: SideLayout
) -> UInt8[Tensor, "*lead parts rows head_dim"]:
    """Inverse of ``pack_rows``: words [..., rows, container words, width] to codes [..., parts, rows, head_dim]."""
    lead, rows = words.shape[:-3], words.shape[-3]
    wide = words.to(torch.int32) & 0xFFFF
    fields = torch.stack([_unpack_field(wide, f, layout.bits) for f in range(FIELDS[layout.bits])], dim=-3)
    fields = fields.to(torch.uint8).view(*lead, layout.parts, layout.chunks, rows, layout.width)
    return fields.movedim(-3, -2).reshape(*lead, layout.parts, rows, layout.head_dim)


def _unpack_field(words: torch.Tensor, f: int, bits: int) -> torch.Tensor:
    if bits == 3:
        if f < 15:
            return words[..., f // 5, :] >> 3 * (f % 5) & 7
        return sum((words[..., i, :] >> 15 & 1) << i for i in range(3))
    word = words[..., 0, :]
    if bits == 4:
        word = (word >> 2 | word << 14) & 0xFFFF
    return word >> bits * f & (1 << bits) - 1


def float_tile(
    words: torch.Tensor, layout: SideLayout, dtype: torch.dtype, levels: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unpack pages for attention, tokens innermost: (tile, factors).

    words    [B, K, P, rows, container words, width] int16 for planes, [B, K, P, tokens, head_dim] uint8 for e4m3.
    levels   book: what the codes name, [2^bits].
    tile     [parts, B, K, head_dim, P * rows] in ``dtype``: code (book: its level) times ``factors``. Token (part,
             page, row) is token ``part * rows + row`` of its page.
    factors  [parts, head_dim] powers of two: every field is left where its mask finds it, which saves the shifts.
    """
    if layout.format == "e4m3":
        tile = words.permute(0, 1, 4, 2, 3).contiguous().view(torch.float8_e4m3fn).to(dtype)
        return tile.flatten(-2).unsqueeze(0), _factors(layout, dtype, words.device)
    # The words are transposed, not the codes: there are FIELDS times fewer of them.
    words = words.permute(0, 1, 4, 5, 2, 3).contiguous().flatten(-2)
    B, K, _, width, tokens = words.shape
    shape = (layout.parts, B, K, layout.chunks, width, tokens)
    fields = torch.empty(shape, dtype=torch.int16, device=words.device)
    for f in range(FIELDS[layout.bits]):
        _mask_field(words, f, layout.bits, fields[f // layout.chunks, :, :, f % layout.chunks])
    factors = _factors(layout, dtype, words.device)
    if layout.format == "book":
        return _named(fields, layout, levels.to(dtype)).flatten(3, 4), torch.ones_like(factors)
    return fields.to(dtype).flatten(3, 4), factors


def _named(fields: torch.Tensor, layout: SideLayout, levels: torch.Tensor) -> torch.Tensor:
    """Levels of masked fields [parts, B, K, chunks, width, tokens], one lookup a field."""
    out = torch.empty(fields.shape, dtype=levels.dtype, device=fields.device)
    for f in range(FIELDS[layout.bits]):
        where = f // layout.chunks, slice(None), slice(None), f % layout.chunks
        codes = fields[where].to(torch.int32)
        shift = 0 if _shifted_down(f, layout.bits) else _lowest_bit(f, layout.bits)
        out[where] = levels[codes >> shift if shift else codes]
    return out


@lru_cache(maxsize=256)
def _factors(layout: SideLayout, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The powers of two that ``_mask_field`` leaves in, [parts, head_dim]."""
    if layout.format == "e4m3":
        return torch.ones(1, layout.head_dim, dtype=dtype, device=device)
    powers = [
        1.0 if _shifted_down(f, layout.bits) else 2.0 ** _lowest_bit(f, layout.bits) for f in range(FIELDS[layout.bits])
    ]
    return (
        torch.tensor(powers, dtype=dtype, device=device).view(layout.parts, -1).repeat_interleave(layout.width, dim=1)
    )


def _lowest_bit(f: int, bits: int) -> int:
    """Position of field f in its word."""
    return {2: 2 * f, 3: 3 * (f % 5), 4: 4 * f + 2, 8: 8 * f}[bits]


def _shifted_down(f: int, bits: int) -> bool:
    """True for the topmost field, which reaches the sign bit of an int16 word or is spread over words."""
    return f == FIELDS[bits] - 1


def _mask_field(words: torch.Tensor, f: int, bits: int, out: torch.Tensor) -> None:
    """Write field f of words [B, K, container words, ...] into ``out``, times two to the power of its position.

    One AND is enough while the field stays below the sign bit; only the topmost field must be shifted down.
    """
    word = words[:, :, f // 5 if bits == 3 and f < 15 else 0]
    if not _shifted_down(f, bits):
        torch.bitwise_and(word, ((1 << bits) - 1) << _lowest_bit(f, bits), out=out)
    elif bits == 3:
        low, middle, high = words.unbind(2)
        out.copy_((low >> 15 & 1) | (middle >> 14 & 2) | (high >> 13 & 4))
    elif bits == 4:
        torch.bitwise_or(word >> 14 & 3, (word & 3) << 2, out=out)
    else:
        torch.bitwise_and(word >> bits * f, (1 << bits) - 1, out=out)
