"""Pages as kernels take them: one pool of bytes, tables of page numbers, and what is static per head."""

from dataclasses import dataclass

import torch

from kvq.kernels.bits import unpack_rows
from kvq.kernels.spec import PageLayout, SideLayout

_DTYPES = {"float16": torch.float16, "uint8": torch.uint8, "int16": torch.int16}


@dataclass(frozen=True, kw_only=True)
class Pages:
    """Packed keys and values of a batch.

    layout          one record a page and KV head.
    pool            uint8; page number n starts ``n * stride`` bytes after the pool's first byte and holds ``heads``
                    records one after the other. Its own shape does not matter.
    table           [B, pages] int32 or int64: page numbers of each sequence, in order.
    stride          bytes from one page number to the next, a multiple of 16.
    heads           KV heads.
    key_scale, value_scale   static scales (e4m3).
    channel_factor  [heads, head_dim] or None: stored keys are keys over these (they multiply the query).
    value_limit     [heads] fp32 or None: an upper bound of every scale of the values, axis token. With it, weights
                    keep their precision however small the scales are.
    """

    layout: PageLayout
    pool: torch.Tensor
    table: torch.Tensor
    heads: int
    stride: int
    key_scale: float = 1.0
    value_scale: float = 1.0
    channel_factor: torch.Tensor | None = None
    value_limit: torch.Tensor | None = None

    @classmethod
    def of(cls, layout: PageLayout, pool: torch.Tensor, table: torch.Tensor, **settings) -> "Pages":
        """Pages of a pool [pages, heads, record_bytes] uint8."""
        assert pool.shape[2] == layout.record_bytes, (pool.shape, layout.record_bytes)
        assert pool.is_contiguous(), "a pool is contiguous"
        return cls(layout=layout, pool=pool, table=table, heads=pool.shape[1], stride=pool.stride(0), **settings)

    @property
    def page_bytes(self) -> int:
        return self.heads * self.layout.record_bytes

    def records(self, numbers: torch.Tensor) -> torch.Tensor:
        """Records of pages [...] as a copy, [..., heads, record_bytes]. The pool must hold every page."""
        size = self.page_bytes
        flat = self.pool.view(-1)
        starts = numbers.long().unsqueeze(-1) * self.stride
        index = starts + torch.arange(size, device=flat.device)
        return flat[index].view(*numbers.shape, self.heads, self.layout.record_bytes)

    def section(self, records: torch.Tensor, side: str, name: str) -> torch.Tensor:
        """One section of records [..., heads, record_bytes] as a view: [..., heads, *page shape]."""
        section = next(s for s in self.layout.side(side).sections if s.name == name)
        start = self.layout.offsets[f"{side}_{name}"]
        raw = records[..., start : start + section.page_bytes(self.layout.page_tokens)]
        return raw.view(_DTYPES[section.dtype]).unflatten(-1, section.page_shape(self.layout.page_tokens))

    def words(self, records: torch.Tensor, side: str) -> torch.Tensor:
        """Words of records as a view: int16 of the layout's shape, or uint8 for e4m3."""
        layout, start = self.layout.side(side), self.layout.offsets[f"{side}_words"]
        raw = records[..., start : start + layout.words_bytes]
        return (raw if layout.format == "e4m3" else raw.view(torch.int16)).unflatten(-1, layout.words_shape)

    def codes(self, records: torch.Tensor, side: str) -> torch.Tensor:
        """Codes of records, [..., heads, page_tokens, head_dim] uint8."""
        layout, words = self.layout.side(side), self.words(records, side)
        return words if layout.format == "e4m3" else unpack_rows(words, layout).flatten(-3, -2)

    def dense(self, side: str, numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The numbers of pages [B, P], dequantized: [B, heads, P * page_tokens, head_dim]."""
        layout, records = self.layout.side(side), self.records(numbers)
        codes = self.codes(records, side)
        if layout.format == "e4m3":
            scale = self.key_scale if side == "key" else self.value_scale
            x = codes.contiguous().view(torch.float8_e4m3fn).to(dtype) * scale
        else:
            x = _affine(codes.to(dtype), self.section(records, side, "meta").to(dtype), layout)
        if side == "key" and self.channel_factor is not None:
            x = x * self.channel_factor.to(dtype).unsqueeze(1)
        return x.transpose(1, 2).flatten(2, 3)


def _affine(codes: torch.Tensor, meta: torch.Tensor, layout: SideLayout) -> torch.Tensor:
    """codes [..., page_tokens, head_dim] * scale + minimum; meta [..., rows, *shape], the last dimension the pair."""
    if layout.axis == "token":
        grouped = codes.unflatten(-1, (-1, layout.group))
        return (grouped * meta[..., :1] + meta[..., 1:]).flatten(-2)
    grouped = codes.unflatten(-2, (-1, layout.group))
    return (grouped * meta[..., 0].unsqueeze(-2) + meta[..., 1].unsqueeze(-2)).flatten(-3, -2)
