"""Uniform codes in torch: the one arithmetic of all implementations.

    scale = (high - low) / (2^bits - 1),   code = round((x - minimum) / scale),   x' = code * scale + minimum

in float32, or float64 for float64 numbers, whatever the tokens' dtype. Every operation of encoding is rounded as IEEE
says, none is fused, halves go to even, and scale and minimum are used as they are stored. Kernels do the same, so the
bytes do not depend on who wrote them.
"""

from collections.abc import Mapping

import torch

from kvq.errors import DataError
from kvq.pages.bits import unpack_codes
from kvq.pages.grouping import grouping_of
from kvq.pages.layout import E4M3_MAX, SideLayout
from kvq.pages.meta import load_pair, load_scale, store_range, store_scale

FLOAT16_MAX = 65504.0


def wide(x: torch.Tensor) -> torch.Tensor:
    """x in float32 or float64: 16-bit numbers are too coarse to compute with."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def refuse_unstorable(form: str, *numbers: torch.Tensor) -> None:
    """Raise DataError if numbers are not finite or beyond what the format holds. CPU only: no device waits for it."""
    limit = E4M3_MAX if form == "e4m3" else FLOAT16_MAX
    for part in numbers:
        if part.device.type == "cpu" and not bool((part.abs() <= limit).all()):
            raise DataError(
                f"keys or values hold NaN, infinity or numbers beyond {limit:.0f}: these cannot be quantized; check "
                "the checkpoint, and run it in float32 or bfloat16."
            )


def encode(x: torch.Tensor, layout: SideLayout, clip: float = 1.0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Codes uint8 like x [..., K, T, head_dim], and the sections ``meta`` (and ``meta_range``) of an affine layout.

    meta is [..., K, T, groups, terms] for axis token, [..., T, 1, terms] if heads share it, and
    [..., K, T / group, head_dim, terms] for axis channel. ``clip``: share of a group's range that the codes span.
    Raises DataError if x holds NaN, infinity or numbers that the metadata cannot hold (checked where it costs no
    device sync).
    """
    grouping = grouping_of(layout)
    grouped = grouping.split(wide(x))
    if layout.meta_terms == 1:
        top = grouped.abs().amax(grouping.dim)
        refuse_unstorable(layout.meta_format, top)
        sections = {"meta": store_scale(2 * top / 2**layout.bits, layout.meta_format).unsqueeze(-1)}
    else:
        low, high = torch.aminmax(grouped, dim=grouping.dim)
        if clip < 1:
            cut = (high - low) * ((1 - clip) / 2)
            low, high = low + cut, high - cut
        refuse_unstorable(layout.meta_format, low, high)
        sections = store_range(low, high, layout.bits, layout.meta_format)
    scale, minimum = (grouping.spread(part) for part in pair(sections, layout, grouped.dtype))
    # Division by a zero scale is avoided: such a group is constant and all its codes are 0.
    codes = (grouped - minimum) / scale.masked_fill(scale == 0, torch.inf)
    return grouping.join(codes.round_().clamp_(0, 2**layout.bits - 1).to(torch.uint8)), sections


def pair(
    sections: Mapping[str, torch.Tensor], layout: SideLayout, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and minimum of every group as numbers, each of the shape of ``meta`` without its last dimension.

    Without a stored minimum, integer codes are symmetric about the middle of their range, and levels about zero.
    """
    if layout.meta_terms == 2:
        return load_pair(sections, layout.bits, layout.meta_format, dtype)
    scale = load_scale(sections["meta"].squeeze(-1), layout.meta_format, dtype)
    return scale, scale * -(2 ** (layout.bits - 1) if layout.format == "affine" else 0)


def scaled(
    numbers: torch.Tensor, sections: Mapping[str, torch.Tensor], layout: SideLayout, dtype: torch.dtype
) -> torch.Tensor:
    """Codes or levels [..., K, T, head_dim] times the scales of their groups, plus the minima, in ``dtype``."""
    grouping = grouping_of(layout)
    scale, minimum = (grouping.spread(part) for part in pair(sections, layout, dtype))
    return grouping.join(torch.addcmul(minimum, grouping.split(numbers).to(dtype), scale))


def tiered(sections: Mapping[str, torch.Tensor], layout: SideLayout, dtype: torch.dtype) -> torch.Tensor:
    """The numbers [..., K, T, head_dim] of slices of channels, which lie in sections (``SideLayout.tiers``).

    A slice that is not stored is zero.
    """
    found = {}
    for part in layout.slices:
        if part.layout is not None:
            own = part.own(sections)
            found[part.first] = scaled(unpack_codes(own["words"], part.layout), own, part.layout, dtype)
    empty = torch.zeros_like(next(iter(found.values())))
    return torch.cat([found.get(part.first, empty) for part in layout.slices], dim=-1)
