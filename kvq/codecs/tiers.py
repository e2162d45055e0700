"""Channels in tiers of their own width: bits where the variance is (transform coding, reverse water-filling).

A head's channels are cut into equal tiers, in order, and every tier is stored with its own number of bits as ``affine``
codes along the channel axis. A tier of 0 bits is not stored: it decodes to zero. This pays where a transform has
sorted the channels by how much their error costs (``principal`` in ``kvq/transforms``): with variances v_c (times what
reads the channel) and errors that fall as v_c 4^-bits, equal bits waste what the small channels do not need.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from kvq.codecs.affine import BITS, METADATA, AffineCodec, check_clip
from kvq.codecs.base import Codec, StaticNumbers
from kvq.codecs.spec import BLOCK_TOKENS, CodecSpec, register_codec
from kvq.errors import RecipeError
from kvq.pages.affine import tiered
from kvq.pages.bits import pack_codes
from kvq.pages.layout import ATOM, SideLayout, sliced_layout
from kvq.pages.pages import Encoded
from kvq.pages.view import Slice, View
from kvq.settings import check_choice, is_one_of


@dataclass(frozen=True, kw_only=True)
class TiersCodec(Codec):
    """bits of each tier, 0, 2, 3, 4 or 8; group: consecutive tokens of a channel that share a scale; meta as affine.

    clip   share of a group's range that the codes of a tier span, as affine; empty: the whole range.
    """

    bits: tuple[int, ...]
    group: int
    head_dim: int
    meta: str = "float16"
    clip: tuple[float, ...] = ()

    scale = 1.0

    def __post_init__(self):
        if self.head_dim % (ATOM * len(self.bits)):
            fits = [n for n in range(1, self.head_dim // ATOM + 1) if self.head_dim % (ATOM * n) == 0]
            raise RecipeError(
                f"{len(self.bits)} tiers do not cut head_dim={self.head_dim} into multiples of {ATOM} channels: give "
                f"{', '.join(map(str, fits))} numbers of bits."
            )

    @property
    def block_tokens(self) -> int:
        return self.group

    @cached_property
    def codecs(self) -> tuple[AffineCodec | None, ...]:
        """By tier; None where nothing is stored."""
        width, clips = self.head_dim // len(self.bits), self.clip or (1.0,) * len(self.bits)
        settings = {"axis": "channel", "group": self.group, "head_dim": width, "meta": self.meta}
        return tuple(
            AffineCodec(bits=bits, clip=clip, **settings) if bits else None for bits, clip in zip(self.bits, clips)
        )

    def layout(self, page_tokens: int) -> SideLayout:
        """Every tier has its words in a section, one row per block, and its metadata in others."""
        return sliced_layout([codec and codec.layout(self.group) for codec in self.codecs], page_tokens)

    def encode(self, x: torch.Tensor) -> Encoded:
        """Encode x [..., K, T, head_dim], whole blocks; codes are empty, everything lies in sections."""
        sections = {}
        for part, codec in zip(self.layout(self.group).slices, self.codecs):
            if codec is not None:
                encoded = codec.encode(x[..., part.first : part.first + part.channels])
                own = {"words": pack_codes(encoded.codes, part.layout), **encoded.sections}
                sections |= {f"{part.prefix}{name}": numbers for name, numbers in own.items()}
        return Encoded(codes=x.new_empty(*x.shape[:-1], 0, dtype=torch.uint8), sections=sections)

    def decode(self, encoded: Encoded, dtype: torch.dtype) -> torch.Tensor:
        """Return the numbers that the tiers stand for, [..., K, T, head_dim]."""
        return tiered(encoded.sections, self.layout(self.group), dtype)

    def view(self, page_tokens: int) -> View:
        parts = (
            Slice(layout=part.layout, prefix=part.prefix, first=part.first, clip=codec.clip)
            for part, codec in zip(self.layout(page_tokens).slices, self.codecs)
            if codec is not None
        )
        return View(slices=tuple(parts), encoding="minmax")

    def static_numbers(self) -> StaticNumbers:
        return StaticNumbers()


@register_codec("tiers")
@dataclass(frozen=True, kw_only=True)
class Tiers(CodecSpec):
    """Affine codes along the channel axis, with bits of their own for equal parts of the channels.

    bits    one number for each part, 2, 3, 4 or 8, or 0 for one that is not stored.
    group   consecutive tokens of a channel that share a scale.
    clip    as of affine, one number for each tier, or one for all.
    meta    as of affine.
    """

    bits: tuple[int, ...]
    group: int
    clip: float | tuple[float, ...] | None = None
    meta: str | None = None

    is_wrappable = False

    def check(self) -> None:
        check_choice("meta", self.meta, METADATA, "metadata of tiers")
        if not isinstance(self.bits, list | tuple) or not self.bits:
            raise RecipeError(f"bits={self.bits!r} are not tiers: give a list such as [4, 2, 2, 2].")
        object.__setattr__(self, "bits", tuple(self.bits))
        for width in self.bits:
            if not is_one_of(width, (0, *BITS)):
                raise RecipeError(f"bits={width!r} of a tier is not a packed width: use one of 0, 2, 3, 4, 8.")
        if not any(self.bits):
            raise RecipeError("every tier has 0 bits, so nothing would be stored: give one of them bits.")
        check_choice("group", self.group, BLOCK_TOKENS, "a block of tokens")
        if isinstance(self.clip, list | tuple):
            object.__setattr__(self, "clip", tuple(self.clip))
            if len(self.clip) != len(self.bits):
                raise RecipeError(f"clip={list(self.clip)!r} does not name a share for each of {len(self.bits)} tiers.")
        for share in self.clip if isinstance(self.clip, tuple) else (self.clip,):
            check_clip(share)

    @property
    def own_block_tokens(self) -> int:
        return self.group

    def bind(self, head_dim, artefacts, heads) -> TiersCodec:
        clip = self.clip if isinstance(self.clip, tuple) else (self.clip,) * len(self.bits) if self.clip else ()
        return TiersCodec(bits=self.bits, group=self.group, head_dim=head_dim, meta=self.meta or "float16", clip=clip)
