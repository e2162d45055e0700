"""How scale and minimum of a group are stored: fp16 numbers, or bytes.

    float16   both as fp16 numbers
    e4m3      both as E4M3 numbers (SKVQ, arXiv 2405.06219), which saturate at 448
    zero8     the scale as UE5M3 (an fp16 number without its sign and its low 7 bits); the minimum as the byte z in
              minimum = -scale * (2^bits - 1) * z / 255, so that its precision follows the scale. The range of a group
              always holds zero.
    range8    axis channel: the scale as UE5M3; the minimum as the byte m in minimum = low + m * step, where (low, step)
              is one fp16 pair for all channels of the block, in the section ``meta_range``
    e8m0      a scale alone, as the exponent of a power of two (MXFP4)

Encoders use the numbers as they are stored, so encoder and decoder agree. A 16-bit pair becomes 16 bits of metadata per
group with ``e4m3``, ``zero8`` and ``range8``.
"""

from collections.abc import Mapping

import torch

from kvq.pages.layout import E4M3_MAX, Section, SideLayout

E8M0_BIAS = 127
# The largest finite fp16 number that a UE5M3 byte holds.
_UE5M3_TOP = 0xF7


def range_section(group: int) -> Section:
    """(low, step) of the minima of a block's channels, for ``range8``."""
    return Section(name="meta_range", shape=(2,), tokens=group)


def to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """E4M3 bytes of numbers, saturating."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)


def from_e4m3(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return codes.contiguous().view(torch.float8_e4m3fn).to(dtype)


def to_ue5m3(x: torch.Tensor) -> torch.Tensor:
    """UE5M3 bytes of numbers of 0 or more: rounded to fp16, then to three bits of mantissa, half to even."""
    bits = x.to(torch.float16).view(torch.int16).to(torch.int32)
    return ((bits + 63 + (bits >> 7 & 1)) >> 7).clamp_(max=_UE5M3_TOP).to(torch.uint8)


def from_ue5m3(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (codes.to(torch.int16) << 7).view(torch.float16).to(dtype)


def quotient(x: torch.Tensor, number: float) -> torch.Tensor:
    """x / number, rounded once: by a number of Python, CUDA would multiply with the rounded reciprocal."""
    return x / torch.full((), number, dtype=x.dtype, device=x.device)


def store_scale(scale: torch.Tensor, form: str) -> torch.Tensor:
    """Scales as they are stored, for ``float16`` and ``e4m3``."""
    return to_e4m3(scale) if form == "e4m3" else scale.to(torch.float16)


def load_scale(stored: torch.Tensor, form: str, dtype: torch.dtype) -> torch.Tensor:
    """Inverse of ``store_scale``, and what ``e8m0`` stands for."""
    if form == "e8m0":
        return torch.exp2(stored.to(dtype) - E8M0_BIAS)
    return from_e4m3(stored, dtype) if form == "e4m3" else stored.to(dtype)


def store_range(low: torch.Tensor, high: torch.Tensor, bits: int, form: str) -> dict[str, torch.Tensor]:
    """Choose and store (scale, minimum) for groups with these ends; codes go from 0 to 2^bits - 1.

    low, high   [..., rows, groups or channels]
    Returns the sections, with ``meta`` [..., rows, groups or channels, 2].
    """
    steps = 2**bits - 1
    sections = {}
    if form == "float16":
        pair = quotient(high - low, steps).to(torch.float16), low.to(torch.float16)
    elif form == "e4m3":
        pair = to_e4m3(quotient(high - low, steps)), to_e4m3(low)
    elif form == "zero8":
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = to_ue5m3(quotient(high - low, steps))
        span = from_ue5m3(scale, low.dtype) * steps
        pair = scale, (-255 * low / span.masked_fill(span == 0, torch.inf)).round_().clamp_(0, 255).to(torch.uint8)
    else:
        ends = _stored_range(low)
        sections["meta_range"] = ends
        start, step = ends.to(low.dtype).unsqueeze(-2).unbind(-1)
        # Rounded down, so that the lowest number of a group stays inside its range.
        code = ((low - start) / step.masked_fill(step == 0, torch.inf)).floor_().clamp_(0, 255)
        pair = to_ue5m3(quotient((high - torch.addcmul(start, code, step)).clamp(min=0), steps)), code.to(torch.uint8)
    sections["meta"] = torch.stack(pair, dim=-1)
    return sections


def _stored_range(low: torch.Tensor) -> torch.Tensor:
    """fp16 (low, step) [..., rows, 2] of minima [..., rows, channels], with low not above any of them."""
    start = low.amin(-1).to(torch.float16)
    above = start.to(low.dtype) > low.amin(-1)
    start = torch.where(above, torch.nextafter(start, torch.full_like(start, -torch.inf)), start)
    return torch.stack([start, quotient(low.amax(-1) - start.to(low.dtype), 255).to(torch.float16)], dim=-1)


def load_pair(
    sections: Mapping[str, torch.Tensor], bits: int, form: str, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and minimum as numbers, each [..., rows, groups or channels]."""
    first, second = sections["meta"].unbind(-1)
    if form == "float16":
        return first.to(dtype), second.to(dtype)
    if form == "e4m3":
        return from_e4m3(first, dtype), from_e4m3(second, dtype)
    scale = from_ue5m3(first, dtype)
    if form == "zero8":
        return scale, scale * (second.to(dtype) * (-(2**bits - 1) / 255))
    start, step = sections["meta_range"].to(dtype).unsqueeze(-2).unbind(-1)
    return scale, torch.addcmul(start, second.to(dtype), step)


def largest_scales(sections: Mapping[str, torch.Tensor], layout: SideLayout) -> torch.Tensor:
    """A bound of the scales of every head's tokens, norms included, float32 [K], or [1] if heads share all of them.

    sections [n, K, rows, *shape], a shared one with or without K = 1. Of layouts that are ``scaled_by_token``. The
    bound is the largest scale but where heads share one factor of it: then it is the product of the largest of both.
    """
    scale = torch.ones(1, 1, 1, 1, device=next(iter(sections.values())).device)
    if layout.meta is not None:
        stored, form = sections["meta"][..., 0], layout.meta_format
        ue5m3 = form in ("zero8", "range8")
        scale = from_ue5m3(stored, torch.float32) if ue5m3 else load_scale(stored, form, torch.float32)
        scale = scale.amax().view(1, 1, 1, 1) if layout.meta_shared else scale
    if "norm" in sections:
        norm = sections["norm"].float()
        shared = any(section.name == "norm" and section.shared for section in layout.extras)
        scale = scale * (norm.amax() if shared else norm.unsqueeze(-1))
    return scale.transpose(0, 1).flatten(1).amax(1)
