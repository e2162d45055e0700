"""Quantize and pack in torch: the bytes that the kernel gives."""

import torch

from kvq.kernels.rotate.reference import rotate_reference
from kvq.kernels.types import Rotation, Source
from kvq.pages.bits import pack_rows, unpack_rows
from kvq.pages.layout import E4M3_MAX, SideLayout
from kvq.pages.pages import Pages


def pack_sequences(source: Source, pages: Pages, side: str, clip: float, rotation: Rotation | None) -> None:
    """Arguments as for ``pack_tokens``."""
    for b, (start, stop) in enumerate(source.ranges.tolist()):
        if stop > start:
            slots = (torch.arange(start, stop, device=source.x.device) + int(source.offsets[b])) % source.x.shape[2]
            x = source.x[b, :, slots]
            x = x if rotation is None else rotate_reference(x, rotation).to(x.dtype)
            _pack_sequence(x.to(torch.promote_types(x.dtype, torch.float32)), pages, side, b, start, clip)


def quantize(x: torch.Tensor, layout: SideLayout, clip: float = 1.0, scale: float = 1.0):
    """Codes (uint8) of x [..., T, head_dim] fp32, and (scale, minimum) pairs [..., rows, *meta shape] fp16 or None."""
    if layout.format == "e4m3":
        return (x / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8), None
    by_token = layout.axis == "token"
    grouped = x.unflatten(-1, (-1, layout.group)) if by_token else x.unflatten(-2, (-1, layout.group))
    dim = -1 if by_token else -2
    low, high = torch.aminmax(grouped, dim=dim, keepdim=True)
    if clip < 1:
        cut = (high - low) * ((1 - clip) / 2)
        low, high = low + cut, high - cut
    steps = 2**layout.bits - 1
    step, minimum = ((high - low) / steps).half(), low.half()
    wide = step.to(x.dtype)
    codes = ((grouped - minimum.to(x.dtype)) / wide.masked_fill(wide == 0, torch.inf)).round().clamp(0, steps)
    meta = torch.stack([step.squeeze(dim), minimum.squeeze(dim)], dim=-1)
    return codes.to(torch.uint8).reshape(x.shape), meta


def _pack_sequence(x: torch.Tensor, pages: Pages, side: str, b: int, start: int, clip: float) -> None:
    """Pack x [KV heads, T, head_dim] of sequence b from token ``start``."""
    layout, size = pages.layout.side(side), pages.layout.page_tokens
    if side == "key" and pages.channel_factor is not None:
        x = x / pages.channel_factor.to(x.dtype).unsqueeze(1)
    codes, meta = quantize(x, layout, clip, pages.key_scale if side == "key" else pages.value_scale)
    if side == "value" and pages.value_limit is not None and layout.format == "affine" and layout.axis == "token":
        torch.maximum(pages.value_limit, meta[..., 0].float().amax(dim=(1, 2)), out=pages.value_limit)
    stop = start + x.shape[1]
    for page in range(start // size, -(-stop // size)):
        first, last = max(start, page * size), min(stop, (page + 1) * size)
        record = _record(pages, int(pages.table[b, page]))
        _write_codes(record, pages, side, first - page * size, codes[:, first - start : last - start])
        if meta is not None:
            per = layout.meta.tokens
            rows = meta[:, (first - start) // per : (last - start) // per]
            target = pages.section(record, side, "meta")
            at = (first - page * size) // per
            target[:, at : at + rows.shape[1]] = rows


def _record(pages: Pages, number: int) -> torch.Tensor:
    """The records of one page as a view, [KV heads, record_bytes]."""
    start = number * pages.stride
    return pages.pool.view(-1)[start : start + pages.page_bytes].view(pages.heads, -1)


def _write_codes(record: torch.Tensor, pages: Pages, side: str, start: int, codes: torch.Tensor) -> None:
    """Write codes [KV heads, t, head_dim] at token ``start`` of a page; rows of words that they touch end there."""
    layout, count = pages.layout.side(side), codes.shape[1]
    target = pages.words(record, side)
    if layout.format == "e4m3":
        target[:, start : start + count] = codes
        return
    frame = unpack_rows(target, layout).flatten(1, 2)
    # A row holds several tokens where parts > 1; those that follow the last one written become zero.
    rows = torch.arange(start, start + count) % layout.rows
    touched = torch.isin(torch.arange(layout.page_tokens) % layout.rows, rows)
    after = touched & (torch.arange(layout.page_tokens) >= start + count)
    frame[:, after.to(frame.device)] = 0
    frame[:, start : start + count] = codes
    target.copy_(pack_rows(frame.unflatten(1, (layout.parts, layout.rows)), layout))
