"""The rotation in torch, from the definition."""

import torch

from kvq.kernels.rotate.hadamard_matrix import hadamard_matrix
from kvq.kernels.types import Rotation


def rotate_reference(x: torch.Tensor, rotation: Rotation, inverse: bool = False) -> torch.Tensor:
    """(x * signs) H of x [..., head_dim], or (x H) * signs, in fp32 at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    signs = rotation.signs.to(x)
    x = x if inverse else x * signs
    x = (x.unflatten(-1, (-1, rotation.block)) @ hadamard_matrix(rotation.block).to(x)).flatten(-2)
    return x * signs if inverse else x
