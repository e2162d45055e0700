"""PackedKV, the one value type for everything that is stored, and what codecs share."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from kvq.codecs.base import Codec, Encoded
from kvq.errors import DataError
from kvq.pages import bits as bits_ops
from kvq.pages.layout import PLANE_FORMATS, SideLayout


@dataclass(frozen=True, kw_only=True)
class PackedKV:
    """Keys or values of whole pages, packed.

    words      planes: [..., K, P, rows, container words, width] int16; e4m3: [..., K, P, page_tokens, head_dim] uint8.
               Packing order: ``kvq/pages/layout.py``. Two-bit codes take two bits.
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

    def of(self, codec: Codec) -> "PackedKV":
        """The same words and sections as another codec reads them: one that this codec wraps."""
        return dataclasses.replace(self, codec=codec)

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
        return self.codec.scores(self, q)

    def weighted_sum(self, p: torch.Tensor) -> torch.Tensor:
        """sum_t p[..., t] * token t: [B, K, M, D]. Only for words of shape [B, K, P, ...]."""
        return self.codec.weighted_sum(self, p)

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + sum(numbers.nbytes for numbers in self.sections.values())


def refuse_unstorable(form: str, *numbers: torch.Tensor) -> None:
    """Raise DataError if numbers are not finite or beyond what the format holds. CPU only: no device waits for it."""
    limit = 448.0 if form == "e4m3" else 65504.0
    for part in numbers:
        if part.device.type == "cpu" and not bool((part.abs() <= limit).all()):
            raise DataError(
                f"keys or values hold NaN, infinity or numbers beyond {limit:.0f}: these cannot be quantized; check "
                "the checkpoint, and run it in float32 or bfloat16."
            )


def wide(x: torch.Tensor) -> torch.Tensor:
    """x in float32 or float64: 16-bit numbers are too coarse to compute with."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def pack_pages(codes: torch.Tensor, layout: SideLayout) -> torch.Tensor:
    """Codes [..., P * page_tokens, head_dim] (uint8) to words [..., P, *layout.words_shape]."""
    lead = codes.shape[:-2]
    if layout.format not in PLANE_FORMATS:
        return codes.view(*lead, codes.shape[-2] // layout.page_tokens, *layout.words_shape)
    codes = codes.reshape(*lead, -1, layout.parts, layout.rows, layout.head_dim)
    return bits_ops.pack_rows(codes, layout)


def unpack_pages(words: torch.Tensor, layout: SideLayout) -> torch.Tensor:
    """Inverse of ``pack_pages``."""
    if layout.format not in PLANE_FORMATS:
        # In format ``sections`` the last dimension is empty.
        return words.flatten(-3, -2)
    codes = bits_ops.unpack_rows(words, layout)
    return codes.reshape(*codes.shape[:-4], -1, layout.head_dim)
