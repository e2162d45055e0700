"""PackedKV: the one value type for everything a codec stores."""

from dataclasses import dataclass

import torch

from kvq.kernels import bits as bits_ops
from kvq.kernels.decode import page_scores, page_weighted_sum
from kvq.kernels.spec import SideLayout
from kvq.quantizers.affine import AffineCodec
from kvq.quantizers.float8 import Float8Codec

Codec = AffineCodec | Float8Codec


@dataclass(frozen=True, kw_only=True)
class PackedKV:
    """Keys or values of whole pages, packed.

    words   affine: [..., P, rows, container words, width] int16; e4m3: [..., P, page_tokens, head_dim] uint8.
            Packing order: ``kvq/kernels/spec.py``. Two-bit codes take two bits.
    meta    [..., P, *layout.meta_shape] fp16, the last dimension (scale, minimum); empty for e4m3.
    codec   what the codes stand for: ``code * scale + minimum``, or ``byte as e4m3 * codec.scale``.
    layout  the page layout of words and meta.

    ``nbytes`` counts words and metadata exactly; the error of an affine number is at most half a scale step plus the
    fp16 rounding of the minimum.
    """

    words: torch.Tensor
    meta: torch.Tensor
    codec: Codec
    layout: SideLayout

    @classmethod
    def pack(cls, x: torch.Tensor, codec: Codec, page_tokens: int | None = None) -> "PackedKV":
        """Quantize and pack x [..., P * page_tokens, head_dim]; T must fill whole pages."""
        page_tokens = page_tokens or codec.page_tokens
        layout = codec.layout(page_tokens)
        codes, meta = codec.encode(x)
        words = pack_pages(codes, layout)
        return cls(
            words=words,
            meta=meta.reshape(*words.shape[: -2 if layout.format == "e4m3" else -3], *layout.meta_shape),
            codec=codec,
            layout=layout,
        )

    def codes(self) -> torch.Tensor:
        """Unpacked codes, [..., P * page_tokens, head_dim] uint8."""
        return unpack_pages(self.words, self.layout)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The stored numbers, [..., P * page_tokens, head_dim]."""
        codes = self.codes()
        tail = self.layout.meta_shape[1:]
        meta = self.meta.reshape(*codes.shape[:-2], -1, *tail) if tail else self.meta
        return self.codec.decode(codes, meta, dtype)

    def scores(self, q: torch.Tensor) -> torch.Tensor:
        """q [B, K, M, D] . every stored token: [B, K, M, T]. Only for words of shape [B, K, P, ...]."""
        return page_scores(q, self.words, self.meta, self.layout, self.codec.scale)

    def weighted_sum(self, p: torch.Tensor) -> torch.Tensor:
        """sum_t p[..., t] * token t: [B, K, M, D]. Only for words of shape [B, K, P, ...]."""
        return page_weighted_sum(p, self.words, self.meta, self.layout, self.codec.scale)

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.meta.nbytes


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
