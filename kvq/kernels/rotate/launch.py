"""Arguments and options of the rotation's launch."""

import torch

from kvq.kernels import dispatch
from kvq.kernels.device.launch import Launch, exactly
from kvq.kernels.rotate.kernel import ROWS, hadamard_rotate
from kvq.kernels.types import Rotation


def hadamard(x: torch.Tensor, rotation: Rotation, out: torch.Tensor, inverse: bool) -> Launch:
    B, heads, tokens, head_dim = x.shape
    return Launch(
        kernel=hadamard_rotate,
        grid=(-(-B * heads * tokens // ROWS.value), head_dim // rotation.block, 1),
        args=(x, out, rotation.signs, B * heads * tokens, tokens, heads, *x.stride()[:3], *out.stride()[:3]),
        constants={
            "D": head_dim,
            "BLOCK": rotation.block,
            "SIGNS": True,
            "INVERSE": inverse,
            "ASM": dispatch.capability(x.device),
        },
        options=exactly(),
    )
