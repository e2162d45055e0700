"""Keys as signs of random projections (QJL, arXiv 2406.03482).

    k ~ c ||k|| / m  S sign(S^T k)        (``projections.py``)

The estimate is linear in the query, so the estimator of q . k is the product with this decoded vector. The m = bits *
head_dim signs lie in planes of ``bits``-bit codes: bit i of the code of channel c is projection i * head_dim + c.

Optionally the ``outlier_channels`` channels of largest length within ``group`` tokens have a sketch of their own, with
outlier_bits * head_dim projections. Both parts are estimated with their own lengths, and each fills only its own
channels.
"""

from dataclasses import dataclass

import torch

from kvq.codecs.affine import BITS, check_bits
from kvq.codecs.base import Codec
from kvq.codecs.projections import directions, estimate, from_bytes, project, to_bytes, unbiasing
from kvq.codecs.spec import BLOCK_TOKENS, CodecSpec, register_codec
from kvq.codecs.wrapping import by_token
from kvq.errors import RecipeError
from kvq.pages.affine import refuse_unstorable, wide
from kvq.pages.layout import Section, SideLayout
from kvq.pages.pages import Encoded, Pages
from kvq.settings import check_choice, check_seed, is_count


@dataclass(frozen=True, kw_only=True)
class SketchCodec(Codec):
    """bits: projections per channel (2, 3, 4, 8); group: tokens that share their outlier channels, 1 without any."""

    bits: int
    head_dim: int
    seed: int = 0
    outlier_channels: int = 0
    outlier_bits: int = 0
    group: int = 1

    @property
    def block_tokens(self) -> int:
        return self.group

    @property
    def _outlier_seed(self) -> int:
        return self.seed + 1

    def layout(self, page_tokens: int) -> SideLayout:
        extras = [Section(name="length", shape=(2,) if self.outlier_channels else (1,))]
        if self.outlier_channels:
            size = self.outlier_bits * self.head_dim // 8
            extras.append(Section(name="outlier_signs", shape=(size,), dtype="uint8"))
            extras.append(
                Section(name="outlier_channels", shape=(self.outlier_channels,), dtype="int16", tokens=self.group)
            )
        return SideLayout(
            format="signs",
            bits=self.bits,
            head_dim=self.head_dim,
            page_tokens=page_tokens,
            meta_terms=0,
            extras=tuple(extras),
        )

    def encode(self, x: torch.Tensor) -> Encoded:
        """Encode x [..., T, head_dim]: ``length`` is fp16 [..., T, 1 or 2], of the rest and of the outliers."""
        x = wide(x)
        sections = {}
        rest = x
        if self.outlier_channels:
            blocks = x.unflatten(-2, (-1, self.group))
            # A stable sort settles ties, so that a row alone and in a batch gives the same channels.
            order = blocks.square().sum(-2).argsort(dim=-1, descending=True, stable=True)
            channels = order[..., : self.outlier_channels].sort(-1).values.to(torch.int16)
            outliers = (blocks * self._taken(channels, x.dtype)).flatten(-3, -2)
            rest = x - outliers
            sections["outlier_channels"] = channels
            sections["outlier_signs"] = to_bytes(
                project(outliers, self.outlier_bits * self.head_dim, self._outlier_seed)
            )
        lengths = [part.norm(dim=-1) for part in ((rest, outliers) if self.outlier_channels else (rest,))]
        refuse_unstorable("float16", *lengths)
        sections["length"] = torch.stack(lengths, dim=-1).half()
        bits = project(rest, self.bits * self.head_dim, self.seed).unflatten(-1, (self.bits, self.head_dim))
        weights = 1 << torch.arange(self.bits, device=x.device).unsqueeze(-1)
        return Encoded(codes=(bits * weights).sum(-2).to(torch.uint8), sections=sections)

    def decode(self, encoded: Encoded, dtype: torch.dtype) -> torch.Tensor:
        """The numbers whose products are the estimates, [..., T, head_dim]. They are longer than the exact keys."""
        length = encoded.sections["length"].to(dtype)
        out = estimate(self._signs(encoded.codes, dtype), length[..., 0], self.head_dim, self.seed)
        if not self.outlier_channels:
            return out
        signs = from_bytes(encoded.sections["outlier_signs"], dtype)
        outliers = estimate(signs, length[..., 1], self.head_dim, self._outlier_seed)
        taken = self._taken(encoded.sections["outlier_channels"], torch.bool).expand(
            *out.shape[:-2], -1, self.group, -1
        )
        return torch.where(taken.flatten(-3, -2), outliers, out)

    def _taken(self, channels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Channels [..., groups, outlier_channels] as ones in [..., groups, 1, head_dim]."""
        ones = torch.zeros(*channels.shape[:-1], self.head_dim, dtype=dtype, device=channels.device)
        return ones.scatter_(-1, channels.long(), 1).unsqueeze(-2)

    def _signs(self, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Codes [..., T, head_dim] to signs [..., T, bits * head_dim]."""
        planes = torch.stack([codes >> i & 1 for i in range(self.bits)], dim=-2)
        return planes.flatten(-2).to(dtype) * 2 - 1

    def scores(self, pages: Pages, side: str, q: torch.Tensor) -> torch.Tensor:
        """Queries are projected, once or once a group; then signs are added up."""
        signs = self._signs(pages.codes(side), q.dtype)
        length = by_token(pages.section(side, "length"), 1).to(q.dtype).unbind(-1)
        if not self.outlier_channels:
            return self._products(q.unsqueeze(2), signs.unsqueeze(2), length[0].unsqueeze(2), self.seed)
        taken = self._taken(by_token(pages.section(side, "outlier_channels"), 1), q.dtype)
        own = q.unsqueeze(2) * taken
        outlier_signs = from_bytes(by_token(pages.section(side, "outlier_signs"), 1), q.dtype)
        parts = (
            (q.unsqueeze(2) - own, signs, length[0], self.seed),
            (own, outlier_signs, length[1], self._outlier_seed),
        )
        return sum(
            self._products(x, found.unflatten(2, (-1, self.group)), size.unflatten(2, (-1, self.group)), seed)
            for x, found, size, seed in parts
        )

    def _products(self, q: torch.Tensor, signs: torch.Tensor, length: torch.Tensor, seed: int) -> torch.Tensor:
        """q [B, K, groups, M, D], signs [B, K, groups, tokens, m]: estimates [B, K, M, groups * tokens]."""
        count = signs.shape[-1]
        turned = q @ (directions(self.head_dim, count, seed) * (unbiasing(self.head_dim) / count)).to(q)
        return ((turned @ signs.transpose(-1, -2)) * length.unsqueeze(-2)).transpose(2, 3).flatten(-2)


@register_codec("sketch")
@dataclass(frozen=True, kw_only=True)
class Sketch(CodecSpec):
    """Signs of random projections, keys only.

    bits               projections per channel, 2, 3, 4 or 8.
    seed               of the projections.
    outlier_channels   channels of a group of tokens that have a sketch of their own; outlier_bits: its projections per
                       channel of the head; group: consecutive tokens that share these channels.
    """

    bits: int
    seed: int | None = None
    outlier_channels: int | None = None
    outlier_bits: int | None = None
    group: int | None = None

    is_placeable = is_wrappable = False
    keys_only = "estimates products with queries"

    def check(self) -> None:
        check_bits(self.bits, BITS)
        check_seed("seed", self.seed)
        outliers = [getattr(self, name) is not None for name in ("outlier_channels", "outlier_bits", "group")]
        if any(outliers) != all(outliers):
            raise RecipeError("outlier_channels, outlier_bits and group belong together: give all of them, or none.")
        if all(outliers):
            check_choice("group", self.group, BLOCK_TOKENS)
            for name in ("outlier_channels", "outlier_bits"):
                if not is_count(getattr(self, name)):
                    raise RecipeError(f"{name}={getattr(self, name)!r} is not a count: use 1 or more.")

    @property
    def own_block_tokens(self) -> int:
        return self.group or 1

    def bind(self, head_dim, artefacts, heads) -> SketchCodec:
        return SketchCodec(
            bits=self.bits,
            head_dim=head_dim,
            seed=self.seed or 0,
            outlier_channels=self.outlier_channels or 0,
            outlier_bits=self.outlier_bits or 0,
            group=self.group or 1,
        )
