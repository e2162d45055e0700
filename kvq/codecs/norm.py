"""Token lengths taken out before another codec (TurboQuant, arXiv 2504.19874; OScaR, arXiv 2605.19660).

    u = x / rms(x),    x' = n * decode(encode(u))

over the channels of one head, or of all heads of a token together (one number for all). A vector of variance 1 is what
Lloyd-Max levels are made for, and the lengths of tokens no longer differ within a channel's group. The stored number n,
fp16, is rms(x), or, at no cost,

    length          ||x|| / ||u'||          the decoded vector has the length of x (norm correction)
    least_squares   (x . u') / (u' . u')    the decoded vector is the nearest to x

A zero vector decodes to zero.
"""

from dataclasses import dataclass, replace

import torch

from kvq.codecs.base import StaticNumbers, WrappingCodec
from kvq.codecs.spec import CodecSpec, PartSpec, register_part
from kvq.codecs.wrapping import by_token, with_sections
from kvq.errors import RecipeError
from kvq.pages.affine import refuse_unstorable, wide
from kvq.pages.layout import Section, SideLayout
from kvq.pages.pages import Encoded, Pages
from kvq.pages.view import View
from kvq.settings import check_choice


@dataclass(frozen=True, kw_only=True)
class NormedCodec(WrappingCodec):
    """part: over what, and which number is stored."""

    part: "Norm"

    def layout(self, page_tokens: int) -> SideLayout:
        return with_sections(self.inner.layout(page_tokens), Section(name="norm", shape=(), shared=self._shared))

    @property
    def _shared(self) -> bool:
        return self.part.over == "token"

    def encode(self, x: torch.Tensor) -> Encoded:
        """Encode x [..., K, T, head_dim]; ``norm`` is fp16 [..., K, T], or [..., T] over all heads."""
        x = wide(x)
        unit, _ = self.unit(x)
        encoded = self.inner.encode(unit)
        if self.part.correct is not None:
            decoded = self.inner.decode(encoded, x.dtype)
            energy = self._mean(decoded.square())
            wanted = self._mean(x * decoded) if self.part.correct == "least_squares" else self._size(x) * _root(energy)
            norm = (wanted / energy).masked_fill(energy == 0, 0)
        else:
            norm = self._size(x)
        return Encoded(codes=encoded.codes, sections={**encoded.sections, "norm": norm.to(torch.float16)})

    def unit(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x over its length, and the length [..., K or 1, T, 1]; a length that is stored as it is, is rounded first."""
        size = self._size(x)
        refuse_unstorable("float16", size)
        if self.part.correct is None:
            size = size.to(torch.float16).to(x.dtype)
        spread = self._spread(size)
        return x / spread.masked_fill(spread == 0, torch.inf), spread

    def _size(self, x: torch.Tensor) -> torch.Tensor:
        return _root(self._mean(x.square()))

    def _mean(self, x: torch.Tensor) -> torch.Tensor:
        """Mean over the numbers of a vector, [..., K, T] or [..., T]; summed in float64, so that no order shows."""
        return x.double().mean((-3, -1) if self._shared else -1).to(x.dtype)

    def _spread(self, norm: torch.Tensor) -> torch.Tensor:
        """[..., K or 1, T, 1]."""
        return (norm.unsqueeze(-2) if self._shared else norm).unsqueeze(-1)

    def decode(self, encoded: Encoded, dtype: torch.dtype) -> torch.Tensor:
        """The stored numbers, [..., K, T, head_dim]."""
        return self.inner.decode(encoded, dtype) * self._spread(encoded.sections["norm"].to(dtype))

    def scores(self, pages: Pages, side: str, q: torch.Tensor) -> torch.Tensor:
        return self.inner.scores(pages, side, q) * self._by_token(pages, side, q.dtype)

    def weighted_sum(self, pages: Pages, side: str, p: torch.Tensor) -> torch.Tensor:
        return self.inner.weighted_sum(pages, side, p * self._by_token(pages, side, p.dtype))

    def static_numbers(self) -> StaticNumbers | str:
        return self.inner.static_numbers()

    def view(self, page_tokens: int) -> View | str:
        inner = self.inner.view(page_tokens)
        if isinstance(inner, str):
            return inner
        # Whoever corrects a length decodes; kernels decode levels alone.
        encoding = inner.encoding if self.part.correct is None or inner.encoding == "unit" else ""
        return replace(inner, norm=self.part.over, correct=self.part.correct, encoding=encoding)

    def compared(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        unit, size = self.unit(x)
        numbers, scale = self.inner.compared(unit)
        return numbers, scale * size.expand_as(scale)

    def _by_token(self, pages: Pages, side: str, dtype: torch.dtype) -> torch.Tensor:
        """[B, K or 1, 1, T]."""
        return self._spread(by_token(pages.section(side, "norm"), 0).to(dtype)).transpose(-1, -2)


def _root(x: torch.Tensor) -> torch.Tensor:
    """The square root, rounded once: of float32 numbers torch's own is one off for a fifth of them on some CPUs."""
    return x.double().sqrt().to(x.dtype)


@register_part("norm")
@dataclass(frozen=True, kw_only=True)
class Norm(PartSpec):
    """Every token is divided by its length before the codec, and multiplied after it.

    over      ``head``: the length of the head's vector (TurboQuant, arXiv 2504.19874); ``token``: of all heads of the
              layer that are stored alike together, stored once (OScaR, arXiv 2605.19660).
    correct   which number is stored. Left out: the length itself. ``length``: what gives the decoded vector the length
              of the exact one. ``least_squares``: what brings it nearest to the exact one.
    """

    over: str
    correct: str | None = None

    order = 20

    def __post_init__(self):
        check_choice("norm.over", self.over, ("head", "token"))
        check_choice("norm.correct", self.correct, ("length", "least_squares"))

    def check_codec(self, spec: CodecSpec) -> None:
        if spec.has_static_ranges:
            raise RecipeError("norm changes the numbers that scale=calibrated was fitted to: remove one of them.")

    def wrap(self, inner, *, base, artefacts, heads) -> NormedCodec:
        return NormedCodec(inner=inner, part=self)
