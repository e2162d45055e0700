"""What codecs give and take, and PackedKV, the one value type for everything that is stored."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from kvq.kernels import bits as bits_ops
from kvq.kernels.decode import has_products, page_scores, page_weighted_sum
from kvq.kernels.spec import SideLayout


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A codec's answer for x [..., K, T, D].

    codes      uint8 [..., K, T, D]; bytes of e4m3 numbers for that format.
    sections   by name of the layout's sections: [..., K, rows, *shape], without K where the section is shared.
    """

    codes: torch.Tensor
    sections: Mapping[str, torch.Tensor]


class Codec(Protocol):
    """Chooses numbers: tensor to codes and sections, and back. It has never seen a model.

    head_dim       channels of a head.
    block_tokens   the smallest number of consecutive tokens that can be encoded alone.
    page_tokens    the smallest page that holds whole blocks.
    """

    head_dim: int
    block_tokens: int
    page_tokens: int

    def layout(self, page_tokens: int) -> SideLayout:
        """The page layout of what ``encode`` gives."""

    def encode(self, x: torch.Tensor) -> Encoded:
        """Encode x [..., K, T, D], whole blocks. Codes do not depend on batch neighbours or on later tokens."""

    def decode(self, encoded: Encoded, dtype: torch.dtype) -> torch.Tensor:
        """The numbers that the codes stand for, [..., K, T, D]."""


@dataclass(frozen=True, kw_only=True)
class PackedKV:
    """Keys or values of whole pages, packed.

    words      affine: [..., K, P, rows, container words, width] int16; e4m3: [..., K, P, page_tokens, head_dim] uint8.
               Packing order: ``kvq/kernels/spec.py``. Two-bit codes take two bits.
    sections   by name: [..., K, P, rows, *shape], without K where the section is shared.
    codec      what the codes stand for.
    layout     the page layout of words and sections.

    ``nbytes`` counts words and sections exactly.
    """

    words: torch.Tensor
    sections: Mapping[str, torch.Tensor]
    codec: Codec
    layout: SideLayout

    @classmethod
    def pack(cls, x: torch.Tensor, codec: Codec, page_tokens: int | None = None) -> "PackedKV":
        """Quantize and pack x [..., K, P * page_tokens, head_dim]; T must fill whole pages."""
        layout = codec.layout(page_tokens or codec.page_tokens)
        encoded = codec.encode(x)
        pages = x.shape[-2] // layout.page_tokens
        sections = {}
        for section in layout.sections:
            numbers = encoded.sections[section.name]
            lead = numbers.shape[: numbers.ndim - 1 - len(section.shape)]
            sections[section.name] = numbers.reshape(*lead, pages, *section.page_shape(layout.page_tokens))
        return cls(words=pack_pages(encoded.codes, layout), sections=sections, codec=codec, layout=layout)

    def codes(self) -> torch.Tensor:
        """Unpacked codes, [..., K, P * page_tokens, head_dim] uint8."""
        return unpack_pages(self.words, self.layout)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The stored numbers, [..., K, P * page_tokens, head_dim]."""
        sections = {}
        for section in self.layout.sections:
            numbers = self.sections[section.name]
            sections[section.name] = numbers.flatten(-2 - len(section.shape), -1 - len(section.shape))
        return self.codec.decode(Encoded(codes=self.codes(), sections=sections), dtype)

    def scores(self, q: torch.Tensor) -> torch.Tensor:
        """q [B, K, M, D] . every stored token: [B, K, M, T]. Only for words of shape [B, K, P, ...]."""
        if has_products(self.layout):
            return page_scores(q, self.words, self.sections.get("meta"), self.layout, self.codec.scale)
        return q @ self.dequantize(q.dtype).transpose(-1, -2)

    def weighted_sum(self, p: torch.Tensor) -> torch.Tensor:
        """sum_t p[..., t] * token t: [B, K, M, D]. Only for words of shape [B, K, P, ...]."""
        if has_products(self.layout):
            return page_weighted_sum(p, self.words, self.sections.get("meta"), self.layout, self.codec.scale)
        return p @ self.dequantize(p.dtype)

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + sum(numbers.nbytes for numbers in self.sections.values())


def pack_pages(codes: torch.Tensor, layout: SideLayout) -> torch.Tensor:
    """Codes [..., P * page_tokens, head_dim] (uint8) to words [..., P, *layout.words_shape]."""
    lead = codes.shape[:-2]
    if layout.format == "e4m3":
        return codes.view(*lead, -1, *layout.words_shape)
    codes = codes.reshape(*lead, -1, layout.parts, layout.rows, layout.head_dim)
    return bits_ops.pack_rows(codes, layout)


def unpack_pages(words: torch.Tensor, layout: SideLayout) -> torch.Tensor:
    """Inverse of ``pack_pages``."""
    if layout.format == "e4m3":
        return words.reshape(*words.shape[:-3], -1, layout.head_dim)
    codes = bits_ops.unpack_rows(words, layout)
    return codes.reshape(*codes.shape[:-4], -1, layout.head_dim)
