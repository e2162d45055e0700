"""The most extreme numbers of every vector beside the codes of another codec (KVQuant, GEAR).

A vector is one token of all heads that are stored together, or one channel of a block of tokens. Its ``count`` largest
and ``count`` smallest numbers are outliers; where the inner codec has static ranges per channel, the ``2 count`` that
lie farthest out of theirs are (arXiv 2401.18079, with a fixed number per token). They are replaced by the mean of the
others before the inner codec sees them, so ranges shrink, and

    x' = decode(...) + value at index,    value = fp16(x - decode(...))

so that adding needs no mask and an outlier is exact to fp16. Indices ascend within a vector.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from kvq.codecs.base import WrappingCodec
from kvq.codecs.book import BookCodec
from kvq.codecs.spec import CodecSpec, PartSpec, register_part
from kvq.codecs.wrapping import by_token, heads_apart, heads_together, with_sections
from kvq.errors import RecipeError
from kvq.pages.affine import refuse_unstorable, wide
from kvq.pages.layout import Section, SideLayout
from kvq.pages.pages import Encoded, Pages
from kvq.pages.view import View
from kvq.settings import check_choice, is_number


def outlier_count(share: float, length: int) -> int:
    """Outliers at each end of a vector of ``length`` numbers."""
    return min(max(1, round(share / 2 * length)), length // 2)


@dataclass(frozen=True, kw_only=True)
class SparseCodec(WrappingCodec):
    """count: outliers at each end; along: ``token`` or ``channel``; heads: heads that are stored together.

    static   codec whose static ranges say what lies outside; None: the extremes are outliers.
    """

    count: int
    along: str
    heads: int
    static: BookCodec | None = None

    def layout(self, page_tokens: int) -> SideLayout:
        if self.along == "token":
            index = "uint8" if self.heads * self.head_dim <= 256 else "int16"
            common = {"shape": (2 * self.count,), "shared": True}
        else:
            index = "uint8"
            common = {"shape": (self.head_dim, 2 * self.count), "tokens": self.block_tokens}
        return with_sections(
            self.inner.layout(page_tokens),
            Section(name="outlier_index", dtype=index, **common),
            Section(name="outlier_value", **common),
        )

    def encode(self, x: torch.Tensor) -> Encoded:
        """Encode x [..., K, T, head_dim]; adds ``outlier_index`` (a channel of all heads, or a token of the block) and
        ``outlier_value`` (fp16): [..., T, 2 count] along tokens, [..., K, T / block, head_dim, 2 count] along channels.
        """
        x = wide(x)
        filled, index = self.split(x)
        encoded = self.inner.encode(filled)
        values = (self._vectors(x) - self._vectors(self.inner.decode(encoded, x.dtype))).gather(-1, index)
        refuse_unstorable("float16", values)
        sections = {"outlier_index": self._stored(index), "outlier_value": values.half()}
        return Encoded(codes=encoded.codes, sections={**encoded.sections, **sections})

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the inner codec is given for x, and the outliers' indices (int64, as ``encode`` stores them)."""
        vectors = self._vectors(x)
        if self.static is not None:
            distance = self._vectors(self.static.normalised(x)).abs()
            return x, distance.argsort(dim=-1, descending=True, stable=True)[..., : 2 * self.count].sort(-1).values
        order = vectors.argsort(dim=-1, stable=True)
        index = torch.cat([order[..., : self.count], order[..., -self.count :]], dim=-1).sort(-1).values
        others = max(1, vectors.shape[-1] - 2 * self.count)
        mean = (vectors.sum(-1, keepdim=True) - vectors.gather(-1, index).sum(-1, keepdim=True)) / others
        return self._back(vectors.scatter(-1, index, mean.expand(index.shape)), x), index

    def compared(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        filled, index = self.split(x)
        numbers, scale = self.inner.compared(filled)
        return self._back(self._vectors(numbers).scatter(-1, index, torch.nan), numbers), scale

    def _vectors(self, x: torch.Tensor) -> torch.Tensor:
        """Vectors in the last dimension: [..., T, K * D], or [..., K, blocks, D, block]."""
        if self.along == "token":
            return heads_together(x)
        return x.unflatten(-2, (-1, self.block_tokens)).transpose(-1, -2)

    def _back(self, vectors: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        if self.along == "token":
            return heads_apart(vectors, self.head_dim)
        return vectors.transpose(-1, -2).reshape(like.shape)

    def _stored(self, index: torch.Tensor) -> torch.Tensor:
        small = self.along == "channel" or self.heads * self.head_dim <= 256
        return index.to(torch.uint8 if small else torch.int16)

    def decode(self, encoded: Encoded, dtype: torch.dtype) -> torch.Tensor:
        """The stored numbers, [..., K, T, head_dim]."""
        decoded = self.inner.decode(encoded, dtype)
        vectors = self._vectors(decoded)
        return self._back(vectors.scatter_add(-1, *_loaded(encoded.sections, dtype)), decoded)

    def view(self, page_tokens: int) -> View | str:
        inner = self.inner.view(page_tokens)
        if isinstance(inner, str):
            return inner
        return replace(inner, encoding="", outliers=(2 * self.count, 0 if self.along == "token" else self.block_tokens))

    def scores(self, pages: Pages, side: str, q: torch.Tensor) -> torch.Tensor:
        scores = self.inner.scores(pages, side, q)
        index, values = self._page_outliers(pages, side, q.dtype)
        if self.along == "channel":
            return scores + q @ self._dense(index, values).transpose(-1, -2)
        # [B, M, T, 2 count]: each outlier times its channel of the queries, added to its head's scores.
        flat = heads_together(q)
        found = flat.gather(-1, index.flatten(1).unsqueeze(1).expand(-1, flat.shape[1], -1))
        found = found.unflatten(-1, index.shape[1:]) * values.unsqueeze(1)
        head = (index // self.head_dim).unsqueeze(1).expand(found.shape)
        for column in range(found.shape[-1]):
            scores.scatter_add_(1, head[..., column].unsqueeze(1), found[..., column].unsqueeze(1))
        return scores

    def weighted_sum(self, pages: Pages, side: str, p: torch.Tensor) -> torch.Tensor:
        out = self.inner.weighted_sum(pages, side, p)
        index, values = self._page_outliers(pages, side, p.dtype)
        if self.along == "channel":
            return out + p @ self._dense(index, values)
        # Weights of each outlier's head, [B, M, T, 2 count], added to its channel.
        head = (index // self.head_dim).unsqueeze(1).expand(-1, p.shape[2], -1, -1)
        weights = torch.stack([p.gather(1, part.unsqueeze(1)).squeeze(1) for part in head.unbind(-1)], dim=-1)
        flat = heads_together(out)
        where = index.flatten(1).unsqueeze(1).expand(-1, flat.shape[1], -1)
        flat = flat.scatter_add(-1, where, (weights * values.unsqueeze(1)).flatten(-2))
        return heads_apart(flat, self.head_dim).contiguous()

    def _page_outliers(self, pages: Pages, side: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices and values, [B, T, 2 count] along tokens, [B, K, blocks, D, 2 count] along channels."""
        dims = 1 if self.along == "token" else 2
        names = ("outlier_index", "outlier_value")
        return _loaded({name: by_token(pages.section(side, name), dims) for name in names}, dtype)

    def _dense(self, index: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Outliers along channels as a tensor [B, K, T, D]."""
        vectors = values.new_zeros(*values.shape[:-1], self.block_tokens).scatter_(-1, index, values)
        return vectors.transpose(-1, -2).flatten(-3, -2)


def _loaded(sections: Mapping[str, torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return sections["outlier_index"].to(torch.long), sections["outlier_value"].to(dtype)


@register_part("outliers")
@dataclass(frozen=True, kw_only=True)
class Outliers(PartSpec):
    """The most extreme numbers of every vector are stored exactly beside the codes, a fixed count of them.

    share   of a vector's numbers, half of them at each end (at least one at each).
    along   what a vector is: ``token`` (one token, all heads of the layer that are stored alike) or ``channel`` (one
            channel of one block of tokens).
    """

    share: float
    along: str

    order = 50

    def __post_init__(self):
        if not is_number(self.share) or not 0 < self.share <= 1:
            raise RecipeError(f"outliers.share={self.share!r} is not a share: use a number above 0 and at most 1.")
        check_choice("outliers.along", self.along, ("token", "channel"))

    def check_codec(self, spec: CodecSpec) -> None:
        if self.along == "channel" and spec.block_tokens == 1:
            raise RecipeError(
                "outliers along channel are chosen among the tokens of a block, and this codec has none: use axis "
                "channel, low_rank, or outliers along token."
            )

    @property
    def outside_share(self) -> float:
        return self.share

    def wrap(self, inner, *, base, artefacts, heads) -> SparseCodec:
        length = heads * inner.head_dim if self.along == "token" else inner.block_tokens
        static = base if self.along == "token" and getattr(base, "static", None) is not None else None
        count = outlier_count(self.share, length)
        return SparseCodec(inner=inner, count=count, along=self.along, heads=heads, static=static)
