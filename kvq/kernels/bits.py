"""Codes to 16-bit words and back, in torch. The layout is ``SideLayout`` of spec.py; tests hold it to a slow oracle.

``pack_rows`` and ``unpack_rows`` work on whole rows of a page; ``float_planes`` is the fast form for attention, which
leaves every field where its mask finds it and reports the power of two by which it is too large.
"""

import torch

from kvq.kernels.spec import CONTAINER_WORDS, FIELDS, SideLayout


def pack_rows(codes: torch.Tensor, layout: SideLayout) -> torch.Tensor:
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


def unpack_rows(words: torch.Tensor, layout: SideLayout) -> torch.Tensor:
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


def float_planes(words: torch.Tensor, layout: SideLayout, dtype: torch.dtype) -> tuple[torch.Tensor, list[float]]:
    """Unpack for attention: (planes, factors).

    words   [..., rows, container words, width] int16 for affine, [..., tokens, head_dim] uint8 for e4m3.
    planes  [fields, ..., rows, width] in ``dtype``; plane f holds ``factors[f] * code``.
    """
    if layout.format == "e4m3":
        return words.view(torch.float8_e4m3fn).to(dtype).unsqueeze(0), [1.0]
    lead, rows = words.shape[:-3], words.shape[-3]
    planes = torch.empty(FIELDS[layout.bits], *lead, rows, layout.width, dtype=torch.int16, device=words.device)
    factors = [_mask_field(words, f, layout.bits, planes[f]) for f in range(FIELDS[layout.bits])]
    return planes.to(dtype), factors


def _mask_field(words: torch.Tensor, f: int, bits: int, out: torch.Tensor) -> float:
    """Write field f times a power of two into ``out`` (int16) and return the power.

    One AND is enough while the field stays below the sign bit; only the topmost field must be shifted down.
    """
    if bits == 3:
        if f < 15:
            torch.bitwise_and(words[..., f // 5, :], 7 << 3 * (f % 5), out=out)
            return float(1 << 3 * (f % 5))
        out.copy_((words[..., 0, :] >> 15 & 1) | (words[..., 1, :] >> 14 & 2) | (words[..., 2, :] >> 13 & 4))
        return 1.0
    word = words[..., 0, :]
    if bits == 4:
        if f < 3:
            torch.bitwise_and(word, 0xF << 4 * f + 2, out=out)
            return float(1 << 4 * f + 2)
        torch.bitwise_or(word >> 14 & 3, (word & 3) << 2, out=out)
        return 1.0
    if bits * (f + 1) < 16:
        torch.bitwise_and(word, ((1 << bits) - 1) << bits * f, out=out)
        return float(1 << bits * f)
    torch.bitwise_and(word >> bits * f, (1 << bits) - 1, out=out)
    return 1.0
