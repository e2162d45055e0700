"""Asymmetric uniform codes with a floating-point minimum (KIVI, FlexGen, per-token integers).

    scale = (max - min) / (2^bits - 1),   code = round((x - min) / scale),   x' = code * scale + min

over groups of ``group`` channels of one token (axis token) or ``group`` tokens of one channel (axis channel; KIVI,
arXiv 2402.02750, section 3). ``clip`` below 1 narrows the range about its middle, and what lies outside saturates.
Scale and minimum are rounded to fp16 before encoding, so encoder and decoder agree. A constant group has scale 0 and
decodes to its (fp16) constant.
"""

from dataclasses import dataclass

import torch

from kvq.errors import DataError
from kvq.kernels.spec import DEFAULT_PAGE_TOKENS, SideLayout
from kvq.quantizers.packed import Encoded

META_DTYPE = torch.float16


@dataclass(frozen=True, kw_only=True)
class AffineCodec:
    """bits in {2, 3, 4, 8}; axis ``token`` or ``channel``; group: numbers that share a scale; head_dim: channels.

    clip   share of a group's range that the codes span.
    """

    bits: int
    axis: str
    group: int
    head_dim: int
    clip: float = 1.0

    # Codes carry their own scales, so nothing static is stored beside the pages.
    scale = 1.0

    @property
    def block_tokens(self) -> int:
        """Smallest number of consecutive tokens that can be encoded alone."""
        return self.group if self.axis == "channel" else 1

    @property
    def page_tokens(self) -> int:
        """Smallest page that holds whole groups."""
        return max(DEFAULT_PAGE_TOKENS, self.block_tokens)

    def layout(self, page_tokens: int) -> SideLayout:
        return SideLayout(
            format="affine",
            bits=self.bits,
            head_dim=self.head_dim,
            page_tokens=page_tokens,
            axis=self.axis,
            group=self.group,
        )

    def encode(self, x: torch.Tensor) -> Encoded:
        """Encode x [..., T, head_dim]; the section ``meta`` (fp16) holds (scale, minimum) in its last dimension.

        meta is [..., T, head_dim / group, 2] for axis token and [..., T / group, head_dim, 2] for axis channel.
        Raises DataError if x holds NaN, infinity or numbers outside fp16 (checked where it costs no device sync).
        """
        grouped, dim = self._grouped(x)
        low, high = torch.aminmax(grouped, dim=dim, keepdim=True)
        if self.clip < 1:
            cut = (high - low) * ((1 - self.clip) / 2)
            low, high = low + cut, high - cut
        steps = 2**self.bits - 1
        scale, minimum = ((high - low) / steps).to(META_DTYPE), low.to(META_DTYPE)
        meta = torch.stack([scale.squeeze(dim), minimum.squeeze(dim)], dim=-1)
        if meta.device.type == "cpu" and not bool(meta.isfinite().all()):
            raise DataError(
                "keys or values hold NaN, infinity or numbers beyond 65504: these cannot be quantized; check the "
                "checkpoint, and run it in float32 or bfloat16."
            )
        scale = scale.to(x.dtype)
        # Division by a zero scale is avoided: such a group is constant and all its codes are 0.
        codes = (grouped - minimum.to(x.dtype)) / scale.masked_fill(scale == 0, torch.inf)
        return Encoded(codes=codes.round_().clamp_(0, steps).to(torch.uint8).reshape(x.shape), sections={"meta": meta})

    def decode(self, encoded: Encoded, dtype: torch.dtype) -> torch.Tensor:
        """Return the numbers that codes and meta stand for, [..., T, head_dim]."""
        grouped, dim = self._grouped(encoded.codes)
        scale, minimum = encoded.sections["meta"].to(dtype).unsqueeze(dim - 1).unbind(-1)
        return torch.addcmul(minimum, grouped.to(dtype), scale).reshape(encoded.codes.shape)

    def _grouped(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        """View x so that dimension ``dim`` runs over the numbers that share a scale."""
        lead, tokens = x.shape[:-2], x.shape[-2]
        if self.axis == "token":
            return x.reshape(*lead, tokens, self.head_dim // self.group, self.group), -1
        return x.reshape(*lead, tokens // self.group, self.group, self.head_dim), -2
