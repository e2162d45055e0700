"""One bit a channel for what another codec left over: TurboQuant's inner-product term (arXiv 2504.19874, algorithm 2).

    r = x - decode(encode(x)),    x' = decoded + c ||r|| / D  S sign(S^T r)

with as many random directions S as channels (``projections.py``), so products with x' are unbiased.
"""

from dataclasses import dataclass

import torch

from kvq.codecs.base import WrappingCodec
from kvq.codecs.projections import directions, estimate, from_bytes, project, to_bytes, unbiasing
from kvq.codecs.spec import PartSpec, register_part
from kvq.codecs.wrapping import by_token, with_sections
from kvq.pages.affine import refuse_unstorable, wide
from kvq.pages.layout import Section, SideLayout
from kvq.pages.pages import Encoded, Pages
from kvq.settings import check_seed


@dataclass(frozen=True, kw_only=True)
class SignedCodec(WrappingCodec):
    """part: the seed of the directions."""

    part: "Signs"

    def layout(self, page_tokens: int) -> SideLayout:
        return with_sections(
            self.inner.layout(page_tokens),
            Section(name="sign_bits", shape=(self.head_dim // 8,), dtype="uint8"),
            Section(name="sign_norm", shape=()),
        )

    def encode(self, x: torch.Tensor) -> Encoded:
        """Encode x [..., T, head_dim]; adds ``sign_bits`` [..., T, head_dim / 8] and ``sign_norm`` [..., T] (fp16)."""
        x = wide(x)
        encoded = self.inner.encode(x)
        rest = x - self.inner.decode(encoded, x.dtype)
        length = rest.norm(dim=-1)
        refuse_unstorable("float16", length)
        bits = to_bytes(project(rest, self.head_dim, self.part.seed))
        sections = {"sign_bits": bits, "sign_norm": length.half()}
        return Encoded(codes=encoded.codes, sections={**encoded.sections, **sections})

    def decode(self, encoded: Encoded, dtype: torch.dtype) -> torch.Tensor:
        """The stored numbers, [..., T, head_dim]."""
        signs = from_bytes(encoded.sections["sign_bits"], dtype)
        rest = estimate(signs, encoded.sections["sign_norm"].to(dtype), self.head_dim, self.part.seed)
        return self.inner.decode(encoded, dtype) + rest

    def scores(self, pages: Pages, side: str, q: torch.Tensor) -> torch.Tensor:
        signs, length = self._page_signs(pages, side, q.dtype)
        turned = q @ directions(self.head_dim, self.head_dim, self.part.seed).to(q)
        return self.inner.scores(pages, side, q) + (turned @ signs.transpose(-1, -2)) * length.unsqueeze(-2)

    def weighted_sum(self, pages: Pages, side: str, p: torch.Tensor) -> torch.Tensor:
        signs, length = self._page_signs(pages, side, p.dtype)
        turned = (p * length.unsqueeze(-2)) @ signs
        inner = self.inner.weighted_sum(pages, side, p)
        return inner + turned @ directions(self.head_dim, self.head_dim, self.part.seed).to(p).T

    def _page_signs(self, pages: Pages, side: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Signs [B, K, T, D], and lengths times the constant of the estimate [B, K, T]."""
        signs = from_bytes(by_token(pages.section(side, "sign_bits"), 1), dtype)
        length = by_token(pages.section(side, "sign_norm"), 0).to(dtype)
        return signs, length * (unbiasing(self.head_dim) / self.head_dim)


@register_part("signs")
@dataclass(frozen=True, kw_only=True)
class Signs(PartSpec):
    """One more bit a channel: the signs of a random projection of what the codec left over (TurboQuant's QJL term).

    seed   of the projection.
    """

    seed: int = 0

    order = 30
    changes_input = False

    def __post_init__(self):
        check_seed("signs.seed", self.seed)

    def wrap(self, inner, *, base, artefacts, heads) -> SignedCodec:
        return SignedCodec(inner=inner, part=self)
