"""Tokens into pages and out of them: quantize and pack, dequantize. One function an operation.

``pack_tokens`` quantizes with the plain min-max grid of its layout (affine) or casts to e4m3; a codec that chooses its
numbers otherwise packs codes with ``kvq.pages.bits``. The torch reference gives the same bytes.
"""

from dataclasses import dataclass

import torch

from kvq.kernels.choice import Choice, choose, why_no_layout
from kvq.kernels.hadamard_matrix import hadamard_matrix
from kvq.pages.bits import pack_rows, unpack_rows
from kvq.pages.layout import E4M3_MAX, SideLayout
from kvq.pages.pages import Pages


@dataclass(frozen=True, kw_only=True)
class Source:
    """Tokens of one side that may be packed.

    x        [B, KV heads, capacity, head_dim], the last dimension contiguous; token t of sequence b is at
             ``(t + offsets[b]) % capacity``.
    ranges   [B, 2] int32: tokens [start, stop) to pack, counted from the first token of the pages; whole groups for
             axis channel.
    offsets  [B] int32; for tokens that begin at x[:, :, 0] it is minus the start, so it may be negative.
    longest  most tokens of a range, known to the host.
    """

    x: torch.Tensor
    ranges: torch.Tensor
    offsets: torch.Tensor
    longest: int


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """A Hadamard rotation on the way: (x * signs) H in blocks of ``block`` channels; signs [head_dim]."""

    block: int
    signs: torch.Tensor


def pack_tokens(
    source: Source,
    pages: Pages,
    side: str,
    *,
    clip: float = 1.0,
    rotation: Rotation | None = None,
    impl: str = "auto",
) -> Choice:
    """Quantize a range of tokens of every sequence and write it to its pages; returns what ran.

    Tokens that stand before a range in its pages keep their codes. ``clip``: share of a group's range that the codes
    span. Raises ``pages.value_limit`` to the largest scale of values (axis token). Two sequences may share only pages
    that neither writes to. Raises KernelError if ``impl="triton"`` cannot run.
    """
    assert pages.layout.side(side).is_plain, "a codec of its own chooses these numbers"
    ran = choose(impl, source.x.device, why_not(pages, rotation))
    if ran.impl == "triton":
        from kvq.kernels.device import launch

        launch.pack(source, pages, side, clip, rotation).run()
        return ran
    for b, (start, stop) in enumerate(source.ranges.tolist()):
        if stop > start:
            slots = (torch.arange(start, stop, device=source.x.device) + int(source.offsets[b])) % source.x.shape[2]
            x = source.x[b, :, slots]
            x = x if rotation is None else rotate_reference(x, rotation).to(x.dtype)
            _pack_sequence(x.to(torch.promote_types(x.dtype, torch.float32)), pages, side, b, start, clip)
    return ran


def why_not(pages: Pages, rotation: Rotation | None = None) -> str | None:
    """Why the kernels cannot pack or unpack these pages, or None."""
    if rotation is not None and (rotation.block & (rotation.block - 1) or not 16 <= rotation.block <= 256):
        return f"rotation of blocks of {rotation.block} channels, not a power of two from 16 to 256"
    return why_no_layout(pages.layout)


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


def unpack_pages(
    pages: Pages,
    side: str,
    lengths: torch.Tensor,
    out: torch.Tensor,
    *,
    impl: str = "auto",
) -> Choice:
    """Dequantize the first ``lengths[b]`` tokens of every sequence into out [B, KV heads, tokens, head_dim].

    lengths [B] int32. What follows them in ``out`` is left alone. Returns what ran.
    """
    ran = choose(impl, out.device, why_not(pages))
    if ran.impl == "triton":
        from kvq.kernels.device import launch

        launch.unpack(pages, side, lengths, out).run()
        return ran
    dtype = torch.promote_types(out.dtype, torch.float32)
    for b, length in enumerate(lengths.tolist()):
        used = -(-length // pages.layout.page_tokens)
        if used:
            out[b, :, :length] = pages.dense(side, pages.table[b : b + 1, :used], dtype)[0, :, :length].to(out.dtype)
    return ran


def rotate_reference(x: torch.Tensor, rotation: Rotation, inverse: bool = False) -> torch.Tensor:
    """(x * signs) H of x [..., head_dim], or (x H) * signs, in fp32 at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    signs = rotation.signs.to(x)
    x = x if inverse else x * signs
    x = (x.unflatten(-1, (-1, rotation.block)) @ hadamard_matrix(rotation.block).to(x)).flatten(-2)
    return x * signs if inverse else x
