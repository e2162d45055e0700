"""Pages as kernels take them: one pool of bytes, tables of page numbers, and what is static per head."""

from dataclasses import dataclass

import torch

from kvq.pages.bits import unpack_rows
from kvq.pages.layout import PLANE_FORMATS, PageLayout, SideLayout

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
    key_scale, value_scale   static factors of all numbers of a side (e4m3 and float4).
    key_levels, value_levels what the codes of a book name, 2^bits numbers.
    channel_factor  [heads, head_dim] or None: stored keys are keys over these (they multiply the query).
    value_limit     [heads] fp32 or None: an upper bound of every scale of the values, norm included, axis token. With
                    it, weights keep their precision however small the scales are.
    """

    layout: PageLayout
    pool: torch.Tensor
    table: torch.Tensor
    heads: int
    stride: int
    key_scale: float = 1.0
    value_scale: float = 1.0
    key_levels: tuple[float, ...] | None = None
    value_levels: tuple[float, ...] | None = None
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
        """Words of records as a view of the layout's shape: int16, uint8 for e4m3, fp16 for dense."""
        layout, start = self.layout.side(side), self.layout.offsets[f"{side}_words"]
        raw = records[..., start : start + layout.words_bytes]
        dtype = {"e4m3": torch.uint8, "dense": torch.float16}.get(layout.format, torch.int16)
        return raw.view(dtype).unflatten(-1, layout.words_shape)

    def codes(self, records: torch.Tensor, side: str) -> torch.Tensor:
        """Codes of records, [..., heads, page_tokens, head_dim] uint8."""
        layout, words = self.layout.side(side), self.words(records, side)
        return unpack_rows(words, layout).flatten(-3, -2) if layout.format in PLANE_FORMATS else words

    def dense(self, side: str, numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The numbers of pages [B, P], dequantized: [B, heads, P * page_tokens, head_dim]."""
        layout, records = self.layout.side(side), self.records(numbers)
        codes = self.codes(records, side)
        levels = self.key_levels if side == "key" else self.value_levels
        if layout.format == "e4m3":
            x = codes.contiguous().view(torch.float8_e4m3fn).to(dtype)
        elif layout.format == "dense":
            x = codes.to(dtype)
        elif layout.format == "book":
            x = torch.tensor(levels, dtype=dtype, device=codes.device)[codes.int()]
        else:
            # Without a minimum, codes are symmetric about the middle of their range.
            x = codes.to(dtype) - (2 ** (layout.bits - 1) if layout.meta_terms == 1 else 0)
        if layout.meta is not None:
            x = _scaled(x, _numbers(self.section(records, side, "meta"), layout.meta_format, dtype), layout)
        if any(section.name == "norm" for section in layout.extras):
            x = x * self.section(records, side, "norm").to(dtype).unsqueeze(-1)
        x = x * (self.key_scale if side == "key" else self.value_scale)
        if side == "key" and self.channel_factor is not None:
            x = x * self.channel_factor.to(dtype).unsqueeze(1)
        return x.transpose(1, 2).flatten(2, 3)


def _numbers(meta: torch.Tensor, form: str, dtype: torch.dtype) -> torch.Tensor:
    if form == "float16":
        return meta.to(dtype)
    if form == "e8m0":
        return torch.exp2(meta.to(dtype) - 127)
    return meta.contiguous().view(torch.float8_e4m3fn).to(dtype)


def _scaled(x: torch.Tensor, meta: torch.Tensor, layout: SideLayout) -> torch.Tensor:
    """x [..., page_tokens, head_dim] * scale (+ minimum); meta [..., rows, *shape], the last dimension the terms."""
    by_token = layout.axis == "token"
    grouped = x.unflatten(-1, (-1, layout.group)) if by_token else x.unflatten(-2, (-1, layout.group))
    terms = [meta[..., i].unsqueeze(-1 if by_token else -2) for i in range(layout.meta_terms)]
    grouped = grouped * terms[0]
    grouped = grouped + terms[1] if len(terms) == 2 else grouped
    return grouped.flatten(-2) if by_token else grouped.flatten(-3, -2)
