"""Quantize and pack in torch: the bytes that the kernel gives."""

import torch

from kvq.kernels.types import Source
from kvq.pages import affine
from kvq.pages.meta import quotient, to_e4m3
from kvq.pages.pages import Encoded, Pages


def pack_sequences(source: Source, pages: Pages, side: str, clip: float) -> None:
    """Arguments as for ``pack_tokens``."""
    for b, (start, stop) in enumerate(source.ranges.tolist()):
        if stop > start:
            slots = (torch.arange(start, stop, device=source.x.device) + int(source.offsets[b])) % source.x.shape[2]
            x = source.x[b, :, slots]
            _pack_sequence(x.to(torch.promote_types(x.dtype, torch.float32)), pages, side, b, start, clip)


def _pack_sequence(x: torch.Tensor, pages: Pages, side: str, b: int, start: int, clip: float) -> None:
    """Pack x [KV heads, T, head_dim] of sequence b from token ``start``."""
    layout, x = pages.layout.side(side), x.unsqueeze(0)
    if layout.format == "e4m3":
        codes, sections = to_e4m3(quotient(x, pages.key_scale if side == "key" else pages.value_scale)), {}
    else:
        codes, sections = affine.encode(x, layout, clip)
    last = -(-(start + x.shape[2]) // layout.page_tokens)
    pages.part(0, last, [b]).write(side, start, Encoded(codes=codes, sections=sections))
