"""Hadamard rotation of queries and keys on the device, block by block."""

import torch

from kvq.kernels.dispatch import Choice, choose, why_no_rotation, why_no_strides
from kvq.kernels.rotate.reference import rotate_reference
from kvq.kernels.types import Rotation


def hadamard(
    x: torch.Tensor,
    rotation: Rotation,
    out: torch.Tensor | None = None,
    *,
    inverse: bool = False,
    impl: str = "auto",
) -> tuple[torch.Tensor, Choice]:
    """Rotate x [B, heads, tokens, head_dim]: (x * signs) H; ``inverse``: (x H) * signs. Returns (out, what ran).

    H is orthonormal, in blocks of ``rotation.block`` channels, a power of two from 16 to 256 that divides head_dim.
    Sums are fp32, rounded once to the dtype of ``out`` (that of x by default). ``out`` may be x.
    """
    block = rotation.block
    assert x.shape[-1] % block == 0, (x.shape, block)
    out = torch.empty_like(x) if out is None else out
    obstacle = "float64" if x.dtype == torch.float64 else why_no_rotation(block) or why_no_strides(x=x, out=out)
    ran = choose(impl, x.device, obstacle)
    if ran.impl == "triton":
        from kvq.kernels.rotate import launch

        launch.hadamard(x, rotation, out, inverse).run()
    else:
        out.copy_(rotate_reference(x, rotation, inverse))
    return out, ran
