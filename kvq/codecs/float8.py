"""FP8 E4M3 with one static scale per tensor: stored = cast(x / scale), largest magnitude 448.

The scale comes from calibration (absolute maximum / 448, the convention of serving engines) or is 1 (a plain cast).
Numbers beyond 448 * scale saturate, as hardware converts them. Hardware rounds to the nearest number, ties to even; a
conversion that cuts bits off rounds toward zero instead, with twice the error (vLLM's CPU kernels).
"""

from dataclasses import dataclass

import torch

from kvq.codecs.packed import Encoded, PackedKV
from kvq.errors import DataError
from kvq.kernels.decode_attention.products import page_scores, page_weighted_sum
from kvq.pages.layout import DEFAULT_PAGE_TOKENS, E4M3_MAX, SideLayout


@dataclass(frozen=True, kw_only=True)
class Float8Codec:
    """scale: the number that a stored 1.0 stands for, positive; head_dim: channels; rounding: ``nearest`` or
    ``toward_zero``."""

    head_dim: int
    scale: float = 1.0
    rounding: str = "nearest"

    bits = 8
    block_tokens = 1
    page_tokens = DEFAULT_PAGE_TOKENS

    def layout(self, page_tokens: int) -> SideLayout:
        return SideLayout(format="e4m3", bits=8, head_dim=self.head_dim, page_tokens=page_tokens)

    def encode(self, x: torch.Tensor) -> Encoded:
        """Encode x [..., T, head_dim]: bytes [..., T, head_dim] (uint8) and no sections."""
        x_scaled = (x / self.scale).clamp(-E4M3_MAX, E4M3_MAX)
        nearest = x_scaled.to(torch.float8_e4m3fn)
        codes = nearest.view(torch.uint8)
        if self.rounding == "toward_zero":
            # Codes of one sign are in the order of their magnitudes.
            codes = codes - (nearest.to(x.dtype).abs() > x_scaled.abs()).to(torch.uint8)
        if x.device.type == "cpu" and not bool(x.isfinite().all()):
            raise DataError(
                "keys or values hold NaN or infinity: these cannot be quantized; check the checkpoint, and run it in "
                "float32 or bfloat16."
            )
        return Encoded(codes=codes, sections={})

    def decode(self, encoded: Encoded, dtype: torch.dtype) -> torch.Tensor:
        """Return the numbers that the bytes stand for, [..., T, head_dim]."""
        return encoded.codes.view(torch.float8_e4m3fn).to(dtype) * self.scale

    def scores(self, packed: PackedKV, q: torch.Tensor) -> torch.Tensor:
        return page_scores(q, packed.words, None, packed.layout, scale=self.scale)

    def weighted_sum(self, packed: PackedKV, p: torch.Tensor) -> torch.Tensor:
        return page_weighted_sum(p, packed.words, None, packed.layout, scale=self.scale)
