"""FP4 E2M1 in blocks with a block scale, bit for bit as hardware formats define it.

    MXFP4   32 channels a block, scale E8M0 = 2^(floor(log2 max|x|) - 2)    (OCP Microscaling Formats 1.0, section 6.3)
    NVFP4   16 channels a block, scale E4M3 = max|x| / 6 / g, global number g = max|tensor| / (6 * 448), or 1

    x' = e2m1[code] * scale * g,   code = sign bit, then the nearest magnitude of {0, .5, 1, 1.5, 2, 3, 4, 6}

Ties go to the even code, and numbers beyond 6 saturate. Blocks lie along the channels of one token.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from kvq.codecs.base import Codec, StaticNumbers
from kvq.codecs.float8 import static_scale
from kvq.codecs.spec import Artefact, CodecSpec, Measured, register_codec
from kvq.errors import RecipeError
from kvq.kernels.decode_attention.products import page_scores, page_weighted_sum
from kvq.pages.affine import refuse_unstorable, wide
from kvq.pages.layout import E4M3_MAX, SideLayout
from kvq.pages.meta import E8M0_BIAS, load_scale, quotient, to_e4m3
from kvq.pages.pages import Encoded, Pages
from kvq.pages.view import Slice, View
from kvq.settings import check_choice

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX = 6.0
# Exponent of the largest E2M1 number, 6 = 1.5 * 2^2.
E2M1_EXPONENT = 2
_SIGN = 8


@dataclass(frozen=True, kw_only=True)
class Float4Codec(Codec):
    """block: channels that share a scale; meta: ``e8m0`` or ``e4m3``; scale: the global number g (e4m3 only)."""

    head_dim: int
    block: int
    meta: str
    scale: float = 1.0

    bits = 4

    def layout(self, page_tokens: int) -> SideLayout:
        return SideLayout(
            format="book",
            bits=4,
            head_dim=self.head_dim,
            page_tokens=page_tokens,
            group=self.block,
            meta_terms=1,
            meta_format=self.meta,
        )

    def encode(self, x: torch.Tensor) -> Encoded:
        """Encode x [..., T, head_dim]; ``meta`` is uint8 [..., T, head_dim / block, 1].

        Raises DataError if x holds NaN, infinity or numbers beyond fp16 (checked where it costs no device sync).
        """
        x = wide(x)
        refuse_unstorable("float16", x)
        blocks = x.unflatten(-1, (-1, self.block))
        top = blocks.abs().amax(-1, keepdim=True)
        if self.meta == "e8m0":
            exponent = torch.frexp(top).exponent - 1 - E2M1_EXPONENT
            # frexp gives zero the exponent 0; the smallest scale stands for it.
            exponent = exponent.masked_fill(top == 0, -E8M0_BIAS).clamp(-E8M0_BIAS, E8M0_BIAS)
            meta = (exponent + E8M0_BIAS).to(torch.uint8)
        else:
            meta = to_e4m3(quotient(quotient(top, E2M1_MAX), self.scale))
        scale = self._scales({"meta": meta}, x.dtype)
        codes = e2m1_codes(blocks / scale.masked_fill(scale == 0, torch.inf))
        return Encoded(codes=codes.flatten(-2), sections={"meta": meta})

    def _scales(self, sections: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """Block scales as numbers, g included, in the shape of ``meta``."""
        scale = load_scale(sections["meta"], self.meta, dtype)
        return scale if self.meta == "e8m0" else scale * self.scale

    def decode(self, encoded: Encoded, dtype: torch.dtype) -> torch.Tensor:
        """Return the numbers that codes and scales stand for, [..., T, head_dim]."""
        numbers = e2m1_levels(dtype, encoded.codes.device)[encoded.codes.to(torch.int32)]
        scale = self._scales(encoded.sections, dtype)
        return (numbers.unflatten(-1, (-1, self.block)) * scale).flatten(-2)

    def static_numbers(self) -> StaticNumbers:
        # The scale of powers of two is whole in its metadata.
        scale = 1.0 if self.meta == "e8m0" else float(self.scale)
        return StaticNumbers(scale=scale, levels=tuple(e2m1_levels(torch.float64).tolist()))

    def view(self, page_tokens: int) -> View:
        numbers = self.static_numbers()
        return View(
            slices=(Slice(layout=self.layout(page_tokens)),),
            encoding="e2m1",
            scale=numbers.scale,
            levels=numbers.levels or (),
            edges=tuple((a + b) / 2 for a, b in itertools.pairwise(MAGNITUDES)),
        )

    def scores(self, pages: Pages, side: str, q: torch.Tensor) -> torch.Tensor:
        return page_scores(q, pages, side, self._pairs(pages, side, q), levels=e2m1_levels(q.dtype, q.device))

    def weighted_sum(self, pages: Pages, side: str, p: torch.Tensor) -> torch.Tensor:
        levels = e2m1_levels(p.dtype, p.device)
        return page_weighted_sum(p, pages, side, self._pairs(pages, side, p), levels=levels)

    def _pairs(self, pages: Pages, side: str, like: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(self._scales({"meta": pages.section(side, "meta")}, like.dtype), (0, 1))


def e2m1_levels(dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
    """What the 16 codes stand for; code 8 is minus zero."""
    magnitudes = torch.tensor(MAGNITUDES, dtype=dtype, device=device)
    return torch.cat([magnitudes, -magnitudes])


def e2m1_codes(x: torch.Tensor) -> torch.Tensor:
    """E2M1 codes (uint8) of numbers, rounded to nearest, ties to even, saturating."""
    middles = torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(MAGNITUDES)], dtype=x.dtype, device=x.device)
    # bucketize sends a number that equals an edge to the lower code, so edges below an even code move down by one ulp.
    edges = torch.where(torch.arange(1, 8, device=x.device) % 2 == 0, torch.nextafter(middles, middles * 0), middles)
    codes = torch.bucketize(x.abs().contiguous(), edges, out_int32=True).to(torch.uint8)
    return codes + _SIGN * torch.signbit(x).to(torch.uint8)


@register_codec("float4")
@dataclass(frozen=True, kw_only=True)
class Float4(CodecSpec):
    """E2M1 in blocks with a block scale.

    group   channels of a block, 16 or 32.
    meta    of the block scales: ``e8m0`` (MXFP4) or ``e4m3`` (NVFP4).
    scale   with meta e4m3: the global scale, ``calibrated`` (the largest magnitude / 2688) or ``unit``.
    """

    group: int
    meta: str
    scale: str | None = None

    def check(self) -> None:
        check_choice("scale", self.scale, ("calibrated", "unit"), "a float4 scale")
        check_choice("meta", self.meta, ("e8m0", "e4m3"), "metadata of float4")
        check_choice("group", self.group, (16, 32), "a block of float4")
        if (self.scale is None) != (self.meta == "e8m0"):
            raise RecipeError("meta=e4m3 needs scale=unit or scale=calibrated beside it, and meta=e8m0 takes none.")

    def own_artefacts(self, head_dim: int, heads: int) -> dict[str, Artefact]:
        return static_scale(()) if self.scale == "calibrated" else {}

    def own_needs(self, tensor: str):
        return [f"{tensor}.range"] if self.scale == "calibrated" else []

    def own_fit(self, measured: Measured) -> dict[str, torch.Tensor]:
        """``scale``, float64 []; 1.0 where all was zero."""
        if self.scale != "calibrated":
            return {}
        scale = measured.absmax().max() / (E2M1_MAX * E4M3_MAX)
        return {"scale": torch.where(scale > 0, scale, 1.0)}

    def bind(self, head_dim, artefacts, heads) -> Float4Codec:
        if head_dim % self.group:
            raise RecipeError(f"a float4 block of {self.group} channels does not divide head_dim={head_dim}.")
        scale = float(artefacts["scale"]) if self.scale == "calibrated" else 1.0
        return Float4Codec(head_dim=head_dim, block=self.group, meta=self.meta, scale=scale)

    @property
    def why_no_channel_groups(self) -> str | None:
        return None

    @property
    def hint(self) -> str | None:
        return "scale=unit" if self.scale == "calibrated" else None
