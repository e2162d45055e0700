"""A low-rank approximation of what another codec left over, per head and block of tokens (GEAR, arXiv 2403.05527).

    E = x - decode(encode(x)),    L = A B^T near E with A [block, rank] and B [head_dim, rank],    x' = decoded + L

The factors come from subspace iteration with a fixed start, P: three times Q = E P, P = E^T Q, columns made orthonormal
each time. They are balanced (A and B share the singular values) and stored as fp16 or E4M3 numbers. Every block has
factors of its own and the same rank, so what is stored does not depend on where a prompt ended: the paper's one
factorisation of a whole prompt (rank 4) besides blocks of decoded tokens (rank 2) would.

Computed in float64, so that neighbours in a batch do not show in the stored factors.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from kvq.codecs.base import WrappingCodec
from kvq.codecs.spec import BLOCK_TOKENS, PartSpec, register_part
from kvq.codecs.wrapping import by_token, with_sections
from kvq.errors import RecipeError
from kvq.pages.affine import refuse_unstorable, wide
from kvq.pages.layout import Section, SideLayout
from kvq.pages.meta import from_e4m3, to_e4m3
from kvq.pages.pages import Encoded, Pages
from kvq.pages.view import View
from kvq.settings import check_choice, is_count

ITERATIONS = 3
_TINY = 1e-150


@dataclass(frozen=True, kw_only=True)
class LowRankCodec(WrappingCodec):
    """part: rank, block (a multiple of the inner codec's) and format of the factors."""

    part: "LowRank"

    @property
    def own_block_tokens(self) -> int:
        return self.part.block

    def layout(self, page_tokens: int) -> SideLayout:
        dtype = "float16" if self.part.format == "float16" else "uint8"
        return with_sections(
            self.inner.layout(page_tokens),
            Section(name="low_rank_token", shape=(self.part.rank,), dtype=dtype),
            Section(name="low_rank_block", shape=(self.head_dim, self.part.rank), dtype=dtype, tokens=self.part.block),
        )

    def encode(self, x: torch.Tensor) -> Encoded:
        """Encode x [..., K, T, head_dim]; adds ``low_rank_token`` [..., K, T, rank] and ``low_rank_block``
        [..., K, T / block, head_dim, rank].
        """
        x = wide(x)
        encoded = self.inner.encode(x)
        residual = (x - self.inner.decode(encoded, x.dtype)).double().unflatten(-2, (-1, self.part.block))
        a, b = factors(residual, self.part.rank)
        refuse_unstorable(self.part.format, a, b)
        store = to_e4m3 if self.part.format == "e4m3" else torch.Tensor.half
        sections = {"low_rank_token": store(a).flatten(-3, -2), "low_rank_block": store(b)}
        return Encoded(codes=encoded.codes, sections={**encoded.sections, **sections})

    def decode(self, encoded: Encoded, dtype: torch.dtype) -> torch.Tensor:
        """The stored numbers, [..., K, T, head_dim]."""
        a = self._loaded(encoded.sections["low_rank_token"], dtype).unflatten(-2, (-1, self.part.block))
        b = self._loaded(encoded.sections["low_rank_block"], dtype)
        return self.inner.decode(encoded, dtype) + (a @ b.transpose(-1, -2)).flatten(-3, -2)

    def _loaded(self, stored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return from_e4m3(stored.contiguous(), dtype) if self.part.format == "e4m3" else stored.to(dtype)

    def view(self, page_tokens: int) -> View | str:
        inner = self.inner.view(page_tokens)
        if isinstance(inner, str):
            return inner
        return replace(inner, encoding="", low_rank=(self.part.rank, self.part.block))

    def scores(self, pages: Pages, side: str, q: torch.Tensor) -> torch.Tensor:
        a, b = self._page_factors(pages, side, q.dtype)
        inner = self.inner.scores(pages, side, q)
        return inner + ((q.unsqueeze(2) @ b) @ a.transpose(-1, -2)).transpose(2, 3).flatten(-2)

    def weighted_sum(self, pages: Pages, side: str, p: torch.Tensor) -> torch.Tensor:
        a, b = self._page_factors(pages, side, p.dtype)
        weights = p.unflatten(-1, (-1, self.part.block)).transpose(2, 3)
        inner = self.inner.weighted_sum(pages, side, p)
        return inner + ((weights @ a) @ b.transpose(-1, -2)).sum(2)

    def _page_factors(self, pages: Pages, side: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """A [B, K, blocks, block, rank] and B [B, K, blocks, head_dim, rank]."""
        a = by_token(pages.section(side, "low_rank_token"), 1).unflatten(2, (-1, self.part.block))
        return self._loaded(a, dtype), self._loaded(by_token(pages.section(side, "low_rank_block"), 2), dtype)


def factors(residual: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A [..., T, rank] and B [..., D, rank] with A B^T near residual [..., T, D]; zeros beyond its rank."""
    rows, columns = residual.shape[-2:]
    used = min(rank, rows, columns)
    p = _start(columns, used).to(residual).expand(*residual.shape[:-2], columns, used)
    for _ in range(ITERATIONS):
        q = _orthonormal(residual @ p)
        p = residual.transpose(-1, -2) @ q
        image, p = p, _orthonormal(p)
    # residual ~ q q^T residual = q image^T, and |image| holds the singular values, which both factors share.
    size = image.norm(dim=-2, keepdim=True).clamp_min(_TINY).sqrt()
    a, b = q * size, image / size
    missing = rank - used
    return (torch.nn.functional.pad(a, (0, missing)), torch.nn.functional.pad(b, (0, missing))) if missing else (a, b)


def _orthonormal(x: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns with the span of x [..., n, rank] (Gram-Schmidt, twice); dependent columns become zero."""
    done: list[torch.Tensor] = []
    for column in x.unbind(-1):
        length = column.norm(dim=-1, keepdim=True)
        for _ in range(2):
            for other in done:
                column = column - (column * other).sum(-1, keepdim=True) * other
        rest = column.norm(dim=-1, keepdim=True)
        # What is left of a dependent column is rounding.
        done.append(torch.where(rest > length * 1e-10, column / rest.clamp_min(_TINY), torch.zeros_like(column)))
    return torch.stack(done, dim=-1)


@lru_cache(maxsize=32)
def _start(columns: int, rank: int) -> torch.Tensor:
    return torch.randn(columns, rank, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@register_part("low_rank")
@dataclass(frozen=True, kw_only=True)
class LowRank(PartSpec):
    """A low-rank approximation of what the codec left over, one per head and block of tokens (GEAR, arXiv 2403.05527).

    rank     columns of the factors.
    block    tokens of a block, which is quantized as a whole.
    format   of the factors: ``float16`` or ``e4m3``.
    """

    rank: int
    block: int
    format: str = "float16"

    order = 40
    changes_input = False

    def __post_init__(self):
        if not is_count(self.rank):
            raise RecipeError(f"low_rank.rank={self.rank!r} is not a rank: use a whole number of 1 or more.")
        check_choice("low_rank.block", self.block, BLOCK_TOKENS)
        check_choice("low_rank.format", self.format, ("float16", "e4m3"))

    @property
    def block_tokens(self) -> int:
        return self.block

    def wrap(self, inner, *, base, artefacts, heads) -> LowRankCodec:
        return LowRankCodec(inner=inner, part=self)
