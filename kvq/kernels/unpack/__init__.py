"""Pages into tokens: dequantize."""

import torch

from kvq.kernels.dispatch import Choice, choose, why_no_layout, why_no_strides
from kvq.pages.pages import Pages


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
    ran = choose(impl, out.device, why_no_layout(pages.layout) or why_no_strides(out=out))
    if ran.impl == "triton":
        from kvq.kernels.unpack import launch

        launch.unpack(pages, side, lengths, out).run()
        return ran
    dtype = torch.promote_types(out.dtype, torch.float32)
    for b, length in enumerate(lengths.tolist()):
        used = -(-length // pages.layout.page_tokens)
        if used:
            out[b, :, :length] = pages.part(0, used, [b]).dense(side, dtype)[0, :, :length].to(out.dtype)
    return ran
