"""Tokens into pages: quantize and pack, with the bytes of a codec.

The Triton kernel packs what a codec's ``view`` tells in full; the reference is the codec itself.
"""

from typing import Protocol

import torch

from kvq.kernels.dispatch import Choice, choose, why_no_layout, why_no_strides
from kvq.kernels.types import Source
from kvq.pages.layout import PageLayout
from kvq.pages.pages import Encoded, Pages
from kvq.pages.view import View, Viewed


class Packed(Viewed, Protocol):
    """A codec, as packing takes it."""

    def encode(self, x: torch.Tensor) -> Encoded: ...


def pack_tokens(source: Source, pages: Pages, side: str, codec: Packed, *, impl: str = "auto") -> Choice:
    """Quantize a range of tokens of every sequence and write it to its pages; returns what ran.

    codec   whose layout the side has. Tokens that stand before a range in its pages keep their codes. Raises
    ``pool.value_limit`` to the largest scale of values (axis token). Two sequences may share only pages that neither
    writes to. Raises KernelError if ``impl="triton"`` cannot run.
    """
    view = codec.view(pages.layout.page_tokens)
    ran = choose(impl, source.x.device, why_no_pack(view, pages.layout) or why_no_strides(tokens=source.x))
    if ran.impl == "triton":
        from kvq.kernels.pack import launch

        assert isinstance(view, View)
        launch.pack(source, pages, side, view).run()
        return ran
    for b, (start, stop) in enumerate(source.ranges.tolist()):
        if stop > start:
            slots = (torch.arange(start, stop, device=source.x.device) + int(source.offsets[b])) % source.x.shape[2]
            last = -(-stop // pages.layout.page_tokens)
            pages.part(0, last, [b]).write(side, start, codec.encode(source.x[b : b + 1, :, slots]))
    return ran


def why_no_pack(view: View | str, layout: PageLayout) -> str | None:
    """Why the Triton kernel does not write what a view says, or None."""
    if isinstance(view, str):
        return view
    if view.low_rank is not None or view.outliers is not None:
        return "numbers beside the codes are chosen in torch"
    if view.statics:
        return "static scales of channels"
    if not view.encoding:
        return "the codec chooses its numbers in torch"
    return why_no_layout(layout)
