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

from kvq.codecs.packed import Encoded, PackedKV, dequantized_sum, refuse_unstorable, unpack_pages, wide
from kvq.codecs.projections import directions, estimate, from_bytes, project, to_bytes, unbiasing
from kvq.codecs.wrapping import by_token
from kvq.pages.layout import DEFAULT_PAGE_TOKENS, Section, SideLayout


@dataclass(frozen=True, kw_only=True)
class SketchCodec:
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
    def page_tokens(self) -> int:
        return max(DEFAULT_PAGE_TOKENS, self.group)

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

    def scores(self, packed: PackedKV, q: torch.Tensor) -> torch.Tensor:
        """Queries are projected, once or once a group; then signs are added up."""
        signs = self._signs(unpack_pages(packed.words, packed.layout), q.dtype)
        length = by_token(packed.sections["length"], 1).to(q.dtype).unbind(-1)
        if not self.outlier_channels:
            return self._products(q.unsqueeze(2), signs.unsqueeze(2), length[0].unsqueeze(2), self.seed)
        taken = self._taken(by_token(packed.sections["outlier_channels"], 1), q.dtype)
        own = q.unsqueeze(2) * taken
        outlier_signs = from_bytes(by_token(packed.sections["outlier_signs"], 1), q.dtype)
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

    def weighted_sum(self, packed: PackedKV, p: torch.Tensor) -> torch.Tensor:
        return dequantized_sum(packed, p)
