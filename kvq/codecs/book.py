"""Codes that name the levels of a static codebook, times a scale: NF4, Lloyd-Max, KVQuant's non-uniform codes.

    code = index of the level nearest to (x - offset) / scale,    x' = level[code] * scale + offset

where scale and offset are, by ``scale``:

    unit        1 and 0 (for numbers that a norm has brought to variance 1)
    absmax      max|x| of the group and 0
    range       half the range of the group and its middle (KVQuant values, arXiv 2401.18079)
    moments     standard deviation and mean of the group
    calibrated  static numbers per channel (KVQuant keys); what lies outside saturates

Dynamic ones are rounded to fp16 before encoding. Edges between levels are their midpoints unless given (Q-Norm decodes
to other levels than it encodes by). A constant group has scale 0 and decodes to its (fp16) offset.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from kvq.codecs.grouping import Grouping
from kvq.codecs.packed import Encoded, PackedKV, refuse_unstorable, wide
from kvq.kernels.decode_attention.products import page_scores, page_weighted_sum
from kvq.pages.layout import DEFAULT_PAGE_TOKENS, SideLayout

META_DTYPE = torch.float16


@dataclass(frozen=True, kw_only=True, eq=False)
class BookCodec:
    """bits in {2, 3, 4}; levels, edges: float64 [2^bits] and [2^bits - 1], ascending.

    scale      as above; grouping: of its dynamic kinds.
    static     scale=calibrated: (scale, offset) [K, head_dim, 2], float64.
    """

    bits: int
    head_dim: int
    levels: torch.Tensor
    edges: torch.Tensor
    scale: str
    grouping: Grouping
    static: torch.Tensor | None = None

    @property
    def block_tokens(self) -> int:
        return self.grouping.group if self.grouping.axis == "channel" else 1

    @property
    def page_tokens(self) -> int:
        return max(DEFAULT_PAGE_TOKENS, self.block_tokens)

    @property
    def meta_terms(self) -> int:
        return {"unit": 0, "calibrated": 0, "absmax": 1}.get(self.scale, 2)

    def layout(self, page_tokens: int) -> SideLayout:
        return SideLayout(
            format="book",
            bits=self.bits,
            head_dim=self.head_dim,
            page_tokens=page_tokens,
            axis=self.grouping.axis,
            group=self.grouping.group,
            meta_terms=self.meta_terms,
            meta_shared=self.grouping.shared,
        )

    def encode(self, x: torch.Tensor) -> Encoded:
        """Encode x [..., K, T, head_dim]; ``meta`` has (scale, offset), or (scale,) for absmax, in its last dimension.

        Raises DataError if x holds NaN, infinity or numbers beyond fp16 (checked where it costs no device sync).
        """
        x = wide(x)
        if self.meta_terms == 0:
            refuse_unstorable("float16", x)
            return Encoded(codes=self._codes(self.normalised(x)), sections={})
        sections = self._measured(x)
        return Encoded(codes=self._codes(self._normalised(x, sections)), sections=sections)

    def normalised(self, x: torch.Tensor) -> torch.Tensor:
        """What is compared with the levels, for x [..., K, T, head_dim]; the same shape."""
        if self.static is not None:
            scale, offset = self._statics(x)
            return (x - offset) / scale
        return x if self.meta_terms == 0 else self._normalised(x, self._measured(x))

    def scales(self, x: torch.Tensor) -> torch.Tensor:
        """What ``normalised`` divides by, for every number of x."""
        if self.static is not None:
            return self._statics(x)[0].expand_as(x)
        if self.meta_terms == 0:
            return torch.ones_like(x)
        scale, _ = self.pair(self._measured(x), x.dtype)
        return self.grouping.join(self.grouping.spread(scale).expand_as(self.grouping.split(x)))

    def _normalised(self, x: torch.Tensor, sections: Mapping[str, torch.Tensor]) -> torch.Tensor:
        scale, offset = (self.grouping.spread(part) for part in self.pair(sections, x.dtype))
        return self.grouping.join((self.grouping.split(x) - offset) / scale.masked_fill(scale == 0, torch.inf))

    def _measured(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """The metadata of x as it is stored."""
        numbers = self._numbers(self.grouping.split(x))
        refuse_unstorable("float16", *numbers)
        return {"meta": torch.stack([number.to(META_DTYPE) for number in numbers], dim=-1)}

    def _numbers(self, grouped: torch.Tensor) -> tuple[torch.Tensor, ...]:
        dim = self.grouping.dim
        if self.scale == "absmax":
            return (grouped.abs().amax(dim),)
        if self.scale == "moments":
            return torch.std(grouped, dim, correction=0), grouped.mean(dim)
        low, high = torch.aminmax(grouped, dim=dim)
        return (high - low) / 2, (high + low) / 2

    def _codes(self, numbers: torch.Tensor) -> torch.Tensor:
        edges = self.edges.to(numbers)
        return torch.bucketize(numbers.contiguous(), edges, out_int32=True).to(torch.uint8)

    def _statics(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Static scale and offset, each [K, 1, head_dim]."""
        return self.static.to(like).unsqueeze(-3).unbind(-1)

    def pair(self, sections: Mapping[str, torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and offset of every group as numbers, each of the shape of ``meta`` without its last dimension."""
        meta = sections["meta"].to(dtype)
        if self.meta_terms == 1:
            return meta[..., 0], torch.zeros_like(meta[..., 0])
        return meta.unbind(-1)

    def decode(self, encoded: Encoded, dtype: torch.dtype) -> torch.Tensor:
        """Return the numbers that codes and meta stand for, [..., K, T, head_dim]."""
        numbers = self.levels.to(encoded.codes.device, dtype)[encoded.codes.to(torch.int32)]
        if self.static is not None:
            scale, offset = self._statics(numbers)
            return torch.addcmul(offset, numbers, scale)
        if self.meta_terms == 0:
            return numbers
        scale, offset = (self.grouping.spread(part) for part in self.pair(encoded.sections, dtype))
        return self.grouping.join(torch.addcmul(offset, self.grouping.split(numbers), scale))

    def scores(self, packed: PackedKV, q: torch.Tensor) -> torch.Tensor:
        levels = self.levels.to(q.device)
        pairs = self._page_pairs(packed, q.dtype)
        if self.static is None:
            return page_scores(q, packed.words, pairs, packed.layout, levels=levels)
        scale, offset = self._statics(q)
        constant = (q * offset).sum(-1, keepdim=True)
        return page_scores(q * scale, packed.words, None, packed.layout, levels=levels) + constant

    def weighted_sum(self, packed: PackedKV, p: torch.Tensor) -> torch.Tensor:
        levels = self.levels.to(p.device)
        out = page_weighted_sum(p, packed.words, self._page_pairs(packed, p.dtype), packed.layout, levels=levels)
        if self.static is None:
            return out
        scale, offset = self._statics(p)
        return torch.addcmul(p.sum(-1, keepdim=True) * offset, out, scale)

    def _page_pairs(self, packed: PackedKV, dtype: torch.dtype) -> torch.Tensor | None:
        """Metadata of pages as plain pairs, [B, K, P, rows, groups or channels, 2]; None for none."""
        if self.meta_terms == 0:
            return None
        pairs = torch.stack(self.pair(packed.sections, dtype), dim=-1)
        if self.grouping.shared:
            pairs = pairs.unsqueeze(1).expand(-1, packed.words.shape[1], *pairs.shape[1:])
        return pairs
