"""FP8 E4M3 with one static scale per tensor: stored = cast(x / scale), largest magnitude 448.

The scale comes from calibration (absolute maximum / 448, the convention of serving engines) or is 1 (a plain cast).
Numbers beyond 448 * scale saturate, as hardware converts them.
"""

from dataclasses import dataclass

import torch

from kvq.errors import DataError
from kvq.kernels.spec import DEFAULT_PAGE_TOKENS, SideLayout
from kvq.quantizers.packed import Encoded

E4M3_MAX = 448.0


@dataclass(frozen=True, kw_only=True)
class Float8Codec:
    """scale: the number that a stored 1.0 stands for, positive; head_dim: channels."""

    head_dim: int
    scale: float = 1.0

    bits = 8
    block_tokens = 1
    page_tokens = DEFAULT_PAGE_TOKENS

    def layout(self, page_tokens: int) -> SideLayout:
        return SideLayout(format="e4m3", bits=8, head_dim=self.head_dim, page_tokens=page_tokens)

    def encode(self, x: torch.Tensor) -> Encoded:
        """Encode x [..., T, head_dim]: bytes [..., T, head_dim] (uint8) and no sections."""
        codes = (x / self.scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        if x.device.type == "cpu" and not bool(x.isfinite().all()):
            raise DataError(
                "keys or values hold NaN or infinity: these cannot be quantized; check the checkpoint, and run it in "
                "float32 or bfloat16."
            )
        return Encoded(codes=codes.view(torch.uint8), sections={})

    def decode(self, encoded: Encoded, dtype: torch.dtype) -> torch.Tensor:
        """Return the numbers that the bytes stand for, [..., T, head_dim]."""
        return encoded.codes.view(torch.float8_e4m3fn).to(dtype) * self.scale
