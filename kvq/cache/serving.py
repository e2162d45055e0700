"""What serves a head group on a device: decided once, when a layer's cache gets its first tokens, and said once."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from transformers.utils import logging

from kvq.cache.plan import HeadGroup
from kvq.kernels.cpp import build
from kvq.kernels.cpp.sides import CppSide, sides_of
from kvq.kernels.dispatch import (
    LARGEST_HEAD,
    Choice,
    choose,
    why_no_attention,
    why_no_side,
    why_no_triton,
)
from kvq.kernels.pack import why_no_pack
from kvq.pages.layout import SIDES
from kvq.transforms.rope_bias import RopeOffset

logger = logging.get_logger(__name__)
LATENT = "pages hold fewer channels than the model's, or those of all heads together"
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, kw_only=True)
class Serving:
    """impl: what was asked for. Every ``no_...`` is a reason, or None where nothing stands against it.

    no_triton   against attending in the Triton kernels; no_cpp: in the C++ kernel.
    two_passes  why pages are decoded to fp16 before the kernels attend.
    no_unpack   by side, against the unpack kernel's decoding them.
    no_pack     by side, against packing in the Triton kernel.
    framed      whether keys enter a frame as they are packed, which torch does.
    cpp_sides   what the C++ kernels read. cpp_packs: by side, what they write, or None.
    """

    impl: str
    device: torch.device
    no_triton: str | None
    no_cpp: str | None
    two_passes: str | None
    no_unpack: Mapping[str, str | None]
    no_pack: Mapping[str, str | None]
    framed: bool
    cpp_sides: Mapping[str, CppSide]
    cpp_packs: Mapping[str, CppSide | None]
    _choices: dict = field(default_factory=dict, compare=False, repr=False)

    @property
    def composes(self) -> bool:
        """Whether the chains of a few tokens are one product a direction (``kvq.transforms.composed``)."""
        return bool(self.cpp_sides)

    @property
    def steps_on_device(self) -> bool:
        """Whether single tokens are packed and attended to without the host (``kvq.cache.device_step``)."""
        return not (self.framed or self.no_triton or self.two_passes or any(self.no_pack.values()))

    def attending(self, obstacle: str | None, many: bool) -> Choice:
        """What attends for a forward. ``obstacle``: what its mask or its tokens have against Triton, or None.

        many: whether several query tokens read one state. Raises KernelError as ``choose`` does.
        """
        key = obstacle, many
        if key not in self._choices:
            no_cpp = self.no_cpp or ("the C++ kernel takes one query token at a time" if many else None)
            ran = choose(self.impl, self.device, self.no_triton or obstacle, no_cpp)
            if ran.impl == "triton" and self.two_passes:
                ran = Choice(impl="triton", reason=f"{ran.reason}; decoded to fp16 first: {self.two_passes}")
            elif ran.impl == "reference" and self.impl == "auto" and self.device.type != "cpu":
                logger.warning_once(f"kvq: packed pages on {self.device.type} are attended to in torch: {ran.reason}.")
            self._choices[key] = ran
        return self._choices[key]


def serving_of(group: HeadGroup, device: torch.device, dtype: torch.dtype, impl: str) -> Serving:
    """Decide for tokens of ``dtype`` on ``device``."""
    known = dtype in KERNEL_DTYPES
    no_triton = why_no_triton(device)
    asked = impl == "triton" or (impl == "auto" and device.type != "cpu")
    if not known:
        no_triton = no_triton or f"queries of {str(dtype).removeprefix('torch.')}"
    if group.loses:
        no_triton = no_triton or LATENT
    if group.head_dim > LARGEST_HEAD:
        no_triton = no_triton or f"head_dim {group.head_dim}, more than {LARGEST_HEAD}"
    no_pack = {
        side: (None if asked else "it was not asked for") or no_triton or _why_no_pack(group, side) for side in SIDES
    }
    cpp = device.type == "cpu" and impl in ("auto", "cpp")
    sides = sides_of(group.codecs, group.layout) if cpp and build.unavailable() is None else {}
    known_sides = {name: side for name, side in sides.items() if isinstance(side, CppSide)}
    found = Serving(
        impl=impl,
        device=device,
        no_triton=no_triton,
        no_cpp=_why_not_compiled(group, sides) if cpp else "it was not asked for",
        two_passes=why_two_passes(group),
        no_unpack={side: no_triton or _why_no_unpack(group, side) for side in SIDES},
        no_pack=no_pack,
        framed=group.frame is not None,
        cpp_sides=known_sides,
        cpp_packs={name: side if (side := known_sides.get(name)) and side.packs else None for name in SIDES},
    )
    if asked and device.type != "cpu":
        _say(found)
    return found


def _say(found: Serving) -> None:
    where = found.device.type
    if found.no_triton is None and found.two_passes:
        logger.warning_once(
            f"kvq: packed pages on {where} are decoded to fp16 in torch before kernels attend: {found.two_passes}."
        )
    for side, reason in found.no_pack.items():
        if reason is not None:
            logger.warning_once(f"kvq: {side}s on {where} are packed in torch: {reason}.")


def why_two_passes(group: HeadGroup) -> str | None:
    """Why pages of this group are decoded before the kernels attend, or None if they are read as they are."""
    if group.loses:
        return LATENT
    if isinstance(group.frame, RopeOffset):
        return "keys are stored without the bias of their projection"
    if group.frame is not None and group.frame.block == 1:
        return "keys are stored before RoPE"
    for side in SIDES:
        numbers = group.codecs[side].static_numbers()
        if isinstance(numbers, str):
            return f"{side}: {numbers}"
    return why_no_attention(group.layout, 0 if group.frame is None else group.frame.block)


def _why_no_unpack(group: HeadGroup, side: str) -> str | None:
    """Why the unpack kernel does not write a side's numbers as they stand in pages, or None."""
    numbers = group.codecs[side].static_numbers()
    return numbers if isinstance(numbers, str) else why_no_side(group.layout.side(side))


def _why_no_pack(group: HeadGroup, side: str) -> str | None:
    """Why the Triton kernel does not pack a side, or None."""
    return why_no_pack(group.codecs[side].view(group.layout.page_tokens), group.layout)


def _why_not_compiled(group: HeadGroup, sides: Mapping[str, CppSide | str]) -> str | None:
    """Why the C++ kernel cannot attend, or None."""
    if group.loses:
        return LATENT
    if isinstance(group.frame, RopeOffset):
        return "keys are stored without the bias of their projection"
    if group.frame is not None and group.layout.page_tokens % group.frame.block:
        return f"blocks of {group.frame.block} tokens do not fill pages of {group.layout.page_tokens}"
    return build.unavailable() or next((side for side in sides.values() if isinstance(side, str)), None)
