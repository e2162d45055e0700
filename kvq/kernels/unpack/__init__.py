"""Pages into tokens: dequantize."""

import torch

from kvq.kernels.dispatch import Choice, choose, why_no_side, why_no_strides
from kvq.pages.pages import Pages


def unpack_pages(
    pages: Pages,
    side: str,
    lengths: torch.Tensor,
    out: torch.Tensor,
    *,
    first_page: int = 0,
    impl: str = "auto",
) -> Choice:
    """Dequantize the first ``lengths[b]`` tokens of every sequence, from page ``first_page`` on, as many as fit, into
    out [B, KV heads, tokens, head_dim] (for ``impl="triton"`` also [B, KV heads, pages, page_tokens, head_dim]).

    lengths [B] int32. What follows them in ``out`` is left alone. Returns what ran.
    """
    ran = choose(impl, out.device, why_no_side(pages.layout.side(side)) or why_no_strides(out=out))
    if ran.impl == "triton":
        from kvq.kernels.unpack import launch

        launch.unpack(pages, side, lengths, out, first_page).run()
        return ran
    dtype = torch.promote_types(out.dtype, torch.float32)
    size = pages.layout.page_tokens
    for b, length in enumerate(lengths.tolist()):
        count = min(length - first_page * size, out.shape[2])
        if count > 0:
            used = pages.part(first_page, first_page - (-count // size), [b])
            out[b, :, :count] = used.dense(side, dtype)[0, :, :count].to(out.dtype)
    return ran
