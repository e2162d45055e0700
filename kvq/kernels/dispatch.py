"""Which implementation runs, and why. Asking for one never gives another; ``auto`` says what it took.

triton      fused kernels on CUDA devices (and, in Triton's interpreter, on CPU tensors)
cpp         C++ kernels on the CPU, for decoding through a cache
reference   torch, on any device
"""

import importlib.util
import os
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

import torch

from kvq.errors import KernelError
from kvq.pages.layout import PageLayout, SideLayout

IMPLEMENTATIONS = ("auto", "triton", "cpp", "reference")
# Versions that the kernels were compiled and counted with.
TESTED_TRITON = ("3.6", "3.9")
LARGEST_HEAD = 256
LARGEST_QUERIES = 16
# Tokens of a matrix product.
SMALLEST_BLOCK = 16


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What ran (``triton``, ``cpp`` or ``reference``), and the reason in a few words."""

    impl: str
    reason: str

    def __str__(self) -> str:
        return f"{self.impl} ({self.reason})"


@lru_cache(maxsize=1)
def triton_version() -> str | None:
    """The installed Triton, without importing it."""
    if importlib.util.find_spec("triton") is None:
        return None
    for package in ("triton", "pytorch-triton", "triton-windows"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "unknown version"


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors (TRITON_INTERPRET=1; slow, for tests)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def capability(device: torch.device) -> int:
    """Compute capability as 90 for 9.0; 0 for the interpreter."""
    if interpreted() or device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def why_no_triton(device: torch.device) -> str | None:
    """Why no Triton kernel can run on a device, or None."""
    if triton_version() is None:
        return "triton is not installed"
    if interpreted():
        return None
    if device.type != "cuda":
        return f"tensors are on {device.type}, and the kernels run on CUDA devices"
    if torch.version.cuda is None:
        return "this torch is not built for CUDA"
    if capability(device) < 80:
        return f"compute capability {capability(device) / 10} is below 8.0"
    return None


def why_no_layout(layout: PageLayout) -> str | None:
    """Why the kernels do not serve a page layout, or None."""
    tokens = layout.page_tokens
    if tokens & (tokens - 1) or tokens < 16:
        return f"pages of {tokens} tokens, not a power of two of at least 16"
    for name in ("key", "value"):
        reason = why_no_side(layout.side(name))
        if reason is not None:
            return f"{name}: {reason}"
    return None


def why_no_attention(layout: PageLayout, frame: int = 0) -> str | None:
    """Why the decode kernel does not read a page layout, or None. ``frame``: tokens that keys share an origin for."""
    reason = why_no_layout(layout)
    if frame and (frame & (frame - 1) or frame < SMALLEST_BLOCK):
        reason = reason or f"keys relative to blocks of {frame} tokens, not a power of two of at least {SMALLEST_BLOCK}"
    for name in ("key", "value"):
        for side in (part.layout for part in layout.side(name).slices):
            if side is not None and side.meta is not None and side.axis == "channel":
                block = min(side.rows, side.group)
                if block < SMALLEST_BLOCK:
                    reason = (
                        reason or f"{name}: {block} tokens in a run that shares scales, fewer than {SMALLEST_BLOCK}"
                    )
    return reason


def why_no_side(side: SideLayout) -> str | None:
    """Why the kernels do not read or write one side of a page, or None."""
    if side.format not in ("affine", "book", "e4m3", "dense") and not side.tiers:
        return f"format {side.format!r}"
    for section in side.extras:
        if section.name not in ("norm", "meta_range") and not side.tiers:
            return f"section {section.name!r}"
    if side.permuted:
        return "permuted channels"
    if side.head_dim > LARGEST_HEAD:
        return f"head_dim {side.head_dim}, more than {LARGEST_HEAD}"
    for piece in (part.layout for part in side.slices if part.layout is not None):
        reason = _why_no_groups(piece)
        if reason is not None:
            return reason
    return None


def _why_no_groups(side: SideLayout) -> str | None:
    """What a side in one piece, or a tier, has against the kernels in its metadata."""
    if side.meta is None:
        return None
    if side.axis == "token" and side.group % 16:
        return f"groups of {side.group} channels, not a multiple of 16"
    if side.axis == "channel" and side.group & (side.group - 1):
        return f"groups of {side.group} tokens, not a power of two"
    return None


def why_no_strides(**tensors: torch.Tensor | None) -> str | None:
    """Why kernels cannot read or write these tensors as they lie, or None: a vector is in one piece."""
    for name, x in tensors.items():
        if x is not None and x.stride(-1) != 1:
            return f"{name} of stride {x.stride(-1)} in the last dimension, not 1"
    return None


def choose(
    impl: str, device: torch.device, obstacle: str | None = None, no_cpp: str | None = "this has no C++ kernel"
) -> Choice:
    """Resolve ``impl`` for tensors on ``device``.

    obstacle   why the Triton kernel cannot do what is asked, or None. no_cpp: likewise for the C++ kernel.

    Raises KernelError if a kernel is asked for by name and cannot run.
    """
    check_implementation(impl)
    if impl == "reference":
        return Choice(impl="reference", reason="asked for")
    reasons = {"triton": why_no_triton(device) or obstacle, "cpp": _why_no_cpp(device) or no_cpp}
    if impl != "auto":
        if reasons[impl] is not None:
            raise KernelError(f"impl={impl!r} cannot run: {reasons[impl]}; use impl='reference' or impl='auto'.")
        interpreter = impl == "triton" and interpreted()
        return Choice(impl=impl, reason="asked for, interpreted" if interpreter else "asked for")
    if device.type == "cpu":
        # Triton's interpreter is for tests: nobody wants it unasked.
        reason = reasons["cpp"]
        if reason is None:
            return Choice(impl="cpp", reason="tensors are on the CPU")
        return Choice(impl="reference", reason=f"tensors are on the CPU, and {reason}")
    if reasons["triton"] is not None:
        return Choice(impl="reference", reason=reasons["triton"])
    return Choice(impl="triton", reason=f"Triton {triton_version()} on compute capability {capability(device) / 10}")


def check_implementation(impl: str) -> None:
    """Raise KernelError if there is no implementation of that name."""
    if impl not in IMPLEMENTATIONS:
        raise KernelError(f"impl={impl!r} is not an implementation: use {', '.join(IMPLEMENTATIONS)}.")


def _why_no_cpp(device: torch.device) -> str | None:
    return None if device.type == "cpu" else f"tensors are on {device.type}, and this kernel runs on the CPU"
