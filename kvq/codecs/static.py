"""What a kernel must know of a codec besides the page layout: numbers that are the same for all pages."""

from dataclasses import dataclass

import torch

from kvq.codecs.affine import AffineCodec
from kvq.codecs.book import BookCodec
from kvq.codecs.float4 import Float4Codec, e2m1_levels
from kvq.codecs.float8 import Float8Codec
from kvq.codecs.norm import NormedCodec
from kvq.codecs.packed import Codec


@dataclass(frozen=True, kw_only=True)
class StaticNumbers:
    """scale: static factor of all numbers. levels: what the codes of a book name, or None.

    Decoded numbers are those of the layout's codes and sections, times ``scale``.
    """

    scale: float = 1.0
    levels: tuple[float, ...] | None = None


def static_numbers(codec: Codec) -> StaticNumbers | str:
    """The static numbers of a codec, or why layout and such numbers do not say all that its codes mean."""
    while isinstance(codec, NormedCodec):
        codec = codec.inner
    if isinstance(codec, AffineCodec):
        return StaticNumbers()
    if isinstance(codec, Float8Codec):
        return StaticNumbers(scale=float(codec.scale))
    if isinstance(codec, Float4Codec):
        # The scale of powers of two is whole in its metadata.
        scale = 1.0 if codec.meta == "e8m0" else float(codec.scale)
        return StaticNumbers(scale=scale, levels=tuple(e2m1_levels(torch.float64).tolist()))
    if isinstance(codec, BookCodec):
        if codec.static is not None:
            return "static scales of channels"
        return StaticNumbers(levels=tuple(codec.levels.double().tolist()))
    return f"codec {type(codec).__name__.removesuffix('Codec').lower()!r}"
