"""Arguments and options of the unpack launch."""

import torch

from kvq.kernels import dispatch
from kvq.kernels.device.launch import Launch, books, exactly, factor
from kvq.kernels.geometry import sides_of
from kvq.kernels.pack.encode import PACK_ROWS
from kvq.kernels.unpack.kernel import unpack_pages
from kvq.pages.pages import Pages


def unpack(pages: Pages, side: str, lengths: torch.Tensor, out: torch.Tensor, first_page: int = 0) -> Launch:
    """out [B, KV heads, tokens, head_dim], or [B, KV heads, pages, page_tokens, head_dim] where pages lie apart."""
    sm = dispatch.capability(out.device)
    own = sides_of(pages.layout)[0 if side == "key" else 1]
    room = out.shape[2] if out.ndim == 4 else out.shape[2] * out.shape[3]
    blocks = -(-max(piece.rows for piece in own.slices) // PACK_ROWS.value)
    return Launch(
        kernel=unpack_pages,
        grid=(-(-room // own.page_tokens) * blocks, out.shape[0], pages.heads),
        args=(
            pages.pool.base,
            pages.table,
            lengths,
            out,
            out.stride(0),
            out.stride(1),
            out.stride(2) * (own.page_tokens if out.ndim == 4 else 1),
            out.stride(-2),
            pages.table.stride(0),
            pages.pool.unit,
            first_page,
            room,
            factor(pages, side),
            books(pages)[0 if side == "key" else 1],
        ),
        constants={"S": own, "BLOCKS": blocks, "RECORD": pages.layout.record_bytes, "ASM": sm},
        options=exactly(),
    )
