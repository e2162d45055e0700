"""Uniform codes with a floating-point minimum (KIVI, FlexGen, per-token integers), or symmetric about zero (ZeroQuant).

    scale = (max - min) / (2^bits - 1),   code = round((x - min) / scale),   x' = code * scale + min

over groups of ``group`` channels of one token (axis token), all heads of one token (shared), or ``group`` tokens of one
channel (axis channel; KIVI, arXiv 2402.02750, section 3). ``clip`` below 1 narrows the range about its middle, and what
lies outside saturates. Symmetric codes (arXiv 2206.01861, as DeepSpeed computes them) have

    scale = 2 max|x| / 2^bits,   code = 2^(bits-1) + clamp(round(x / scale), -2^(bits-1), 2^(bits-1) - 1)

Scale and minimum are rounded to how they are stored (``kvq.pages.meta``) before encoding, so encoder and decoder agree.
A constant group has scale 0 and decodes to its stored constant.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from kvq.codecs.base import Codec, StaticNumbers
from kvq.codecs.grouped import GroupedSpec
from kvq.codecs.spec import register_codec
from kvq.errors import RecipeError
from kvq.kernels.decode_attention.products import page_scores, page_weighted_sum
from kvq.pages import affine
from kvq.pages.grouping import grouping_of
from kvq.pages.layout import SideLayout
from kvq.pages.meta import range_section
from kvq.pages.pages import Encoded, Pages
from kvq.pages.view import Slice, View
from kvq.settings import check_choice, check_flag, is_number, is_one_of

BITS = (2, 3, 4, 8)
METADATA = ("float16", "e4m3", "zero8", "range8")


@dataclass(frozen=True, kw_only=True)
class AffineCodec(Codec):
    """bits in {2, 3, 4, 8}; axis ``token`` or ``channel``; group: numbers that share a scale; head_dim: channels.

    clip        share of a group's range that the codes span.
    symmetric   no minimum is stored.
    meta        a format of ``kvq.pages.meta``.
    shared      axis token: all heads share a scale, and group is head_dim.
    """

    bits: int
    axis: str
    group: int
    head_dim: int
    clip: float = 1.0
    symmetric: bool = False
    meta: str = "float16"
    shared: bool = False

    # Codes carry their own scales, so nothing static is stored beside the pages.
    scale = 1.0

    @property
    def block_tokens(self) -> int:
        """Smallest number of consecutive tokens that can be encoded alone."""
        return self.group if self.axis == "channel" else 1

    @cached_property
    def _grid(self) -> SideLayout:
        return self.layout(self.page_tokens)

    def layout(self, page_tokens: int) -> SideLayout:
        return SideLayout(
            format="affine",
            bits=self.bits,
            head_dim=self.head_dim,
            page_tokens=page_tokens,
            axis=self.axis,
            group=self.group,
            meta_terms=1 if self.symmetric else 2,
            meta_format=self.meta,
            meta_shared=self.shared,
            extras=(range_section(self.group),) if self.meta == "range8" else (),
        )

    def encode(self, x: torch.Tensor) -> Encoded:
        """Encode x [..., K, T, head_dim], as ``kvq.pages.affine.encode`` says."""
        codes, sections = affine.encode(x, self._grid, self.clip)
        return Encoded(codes=codes, sections=sections)

    def decode(self, encoded: Encoded, dtype: torch.dtype) -> torch.Tensor:
        """Return the numbers that codes and meta stand for, [..., K, T, head_dim]."""
        return affine.scaled(encoded.codes, encoded.sections, self._grid, dtype)

    def static_numbers(self) -> StaticNumbers:
        return StaticNumbers()

    def view(self, page_tokens: int) -> View:
        part = Slice(layout=self.layout(page_tokens), clip=self.clip)
        return View(slices=(part,), encoding="symmetric" if self.symmetric else "minmax")

    def fake_quantized(self, x: torch.Tensor) -> torch.Tensor:
        """Straight through rounding, with gradients to the numbers that set a group's scale and minimum; fp16 rounding
        of the metadata is left out."""
        if self.symmetric:
            return super().fake_quantized(x)
        grouping = grouping_of(self._grid)
        grouped = grouping.split(x)
        low, high = torch.aminmax(grouped, dim=grouping.dim, keepdim=True)
        if self.clip < 1:
            cut = (high - low) * ((1 - self.clip) / 2)
            low, high = low + cut, high - cut
        steps = 2**self.bits - 1
        scale = ((high - low) / steps).clamp_min(torch.finfo(torch.float16).tiny)
        codes = (grouped - low) / scale
        codes = (codes + (codes.round() - codes).detach()).clamp(0, steps)
        return grouping.join(codes * scale + low)

    def scores(self, pages: Pages, side: str, q: torch.Tensor) -> torch.Tensor:
        return page_scores(q, pages, side, self._page_pairs(pages, side, q.dtype))

    def weighted_sum(self, pages: Pages, side: str, p: torch.Tensor) -> torch.Tensor:
        return page_weighted_sum(p, pages, side, self._page_pairs(pages, side, p.dtype))

    def _page_pairs(self, pages: Pages, side: str, dtype: torch.dtype) -> torch.Tensor:
        """Metadata of pages as plain pairs, [B, K, P, rows, groups or channels, 2]."""
        if pages.layout.side(side).is_plain:
            return pages.section(side, "meta")
        names = ("meta", "meta_range") if self.meta == "range8" else ("meta",)
        pairs = torch.stack(affine.pair({name: pages.section(side, name) for name in names}, self._grid, dtype), dim=-1)
        return pairs.unsqueeze(1).expand(-1, pages.heads, *pairs.shape[1:]) if self.shared else pairs


@register_codec("affine")
@dataclass(frozen=True, kw_only=True)
class Affine(GroupedSpec):
    """Integer codes with a scale and a minimum.

    bits          2, 3, 4 or 8.
    axis, group   what shares a scale (``GroupedSpec``).
    clip          share of a group's range that the codes span, above 0 to 1; what lies outside saturates.
    symmetric     codes are centred on zero, and there is no minimum (ZeroQuant, arXiv 2206.01861).
    meta          how scale and minimum are stored (``kvq.pages.meta``): ``float16`` (default), ``e4m3``, ``zero8`` or
                  ``range8``.
    """

    bits: int
    axis: str
    group: int | str
    clip: float | None = None
    symmetric: bool | None = None
    meta: str | None = None

    def check(self) -> None:
        check_choice("meta", self.meta, METADATA, "metadata of affine")
        check_bits(self.bits, BITS)
        self.check_group()
        check_clip(self.clip)
        check_flag("symmetric", self.symmetric)
        if self.symmetric and self.meta in ("zero8", "range8"):
            raise RecipeError(f"symmetric codes have no minimum for meta={self.meta} to store: use float16 or e4m3.")
        if self.meta == "range8" and self.axis != "channel":
            raise RecipeError(
                "meta=range8 stores minima relative to those of the other channels: use axis channel, or meta zero8."
            )

    def bind(self, head_dim, artefacts, heads) -> AffineCodec:
        return AffineCodec(
            bits=self.bits,
            axis=self.axis,
            group=self.group_size(head_dim),
            head_dim=head_dim,
            clip=self.clip or 1.0,
            symmetric=bool(self.symmetric),
            meta=self.meta or "float16",
            shared=self.group == "token",
        )

    @property
    def token_dtype_bits(self) -> int | None:
        is_plain = set(self.to_dict()) <= {"codec", "bits", "axis", "group", "symmetric"}
        return self.bits if is_plain and (self.axis, self.group) == ("token", "head") else None


def check_bits(bits, widths: tuple[int, ...]) -> None:
    if not is_one_of(bits, widths):
        raise RecipeError(f"bits={bits!r} is not a packed width: use one of {', '.join(map(str, widths))}.")


def check_clip(clip) -> None:
    if clip is not None and (not is_number(clip) or not 0 < clip <= 1):
        raise RecipeError(f"clip={clip!r} is not a share of the range: use a number above 0 and at most 1.")
