"""Tokens into pages: quantize and pack.

``pack_tokens`` quantizes with the plain min-max grid of its layout (affine) or casts to e4m3; a codec that chooses its
numbers otherwise packs codes with ``kvq.pages.bits``. The torch reference gives the same bytes.
"""

from kvq.kernels.dispatch import Choice, choose, why_no_layout, why_no_strides
from kvq.kernels.pack.reference import pack_sequences
from kvq.kernels.types import Source
from kvq.pages.pages import Pages


def pack_tokens(
    source: Source,
    pages: Pages,
    side: str,
    *,
    clip: float = 1.0,
    impl: str = "auto",
) -> Choice:
    """Quantize a range of tokens of every sequence and write it to its pages; returns what ran.

    Tokens that stand before a range in its pages keep their codes. ``clip``: share of a group's range that the codes
    span. Raises ``pool.value_limit`` to the largest scale of values (axis token). Two sequences may share only pages
    that neither writes to. Raises KernelError if ``impl="triton"`` cannot run.
    """
    assert pages.layout.side(side).is_plain, "a codec of its own chooses these numbers"
    ran = choose(impl, source.x.device, why_no_layout(pages.layout) or why_no_strides(tokens=source.x))
    if ran.impl == "triton":
        from kvq.kernels.pack import launch

        launch.pack(source, pages, side, clip).run()
        return ran
    pack_sequences(source, pages, side, clip)
    return ran
