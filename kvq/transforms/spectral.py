"""OSCAR's closed-form rotation (arXiv 2605.17757): eigenvectors of what reads a tensor, spread by a Hadamard.

    C_K = mean over KV heads of Q^T Q / n          C_V = mean over KV heads of V^T diag(w) V / n,
                                                   w_t = k_t (Q^T Q / n) k_t^T, normalised to mean 1
    R = U H P

U: eigenvectors of C by falling eigenvalue, P: column r goes to the bit-reversed index of r (powers of two only). One
rotation for all heads of a layer.
"""

from typing import ClassVar

import torch
from torch import Tensor

from kvq.shapes import Float, checked
from kvq.transforms.fit_data import FitData
from kvq.transforms.hadamard_matrix import hadamard_matrix
from kvq.transforms.spec import TransformSpec, register_transform
from kvq.transforms.steps import Matrix


@register_transform("spectral")
class SpectralSpec(TransformSpec):
    """Eigenvectors of what reads the tensor, then a Hadamard (OSCAR, arXiv 2605.17757)."""

    tensors: ClassVar = {"matrix": "1DD"}
    mixes_channels = True

    def needs(self, side):
        return ["query.range", "query.moments", *(["reservoir"] if side == "value" else [])]

    def fit(self, data: FitData) -> dict[str, torch.Tensor]:
        return {"matrix": rotation(data).unsqueeze(0).float()}

    def build(self, head_dim, tensors) -> Matrix:
        return Matrix(tensors["matrix"])


def rotation(data: FitData) -> torch.Tensor:
    """R of one side, [D, D], orthogonal."""
    moments = data.moment("query") if data.side == "key" else _weighted_second(data)
    vectors = eigenvectors(moments.mean(0))
    size = len(vectors)
    mixed = vectors @ hadamard_matrix(size)
    if size & (size - 1) == 0:
        digits = size.bit_length() - 1
        mixed = mixed[:, [int(f"{i:0{digits}b}"[::-1], 2) for i in range(size)]]
    return mixed


def _weighted_second(data: FitData) -> torch.Tensor:
    """Second moment of values, weighed by the mean square of their tokens' logits, [K, D, D]."""
    keys, values = data.tokens("key"), data.tokens("value")
    weights = ((keys @ data.moment("query")) * keys).sum(-1, keepdim=True)
    return values.transpose(-1, -2) @ (values * weights / weights.sum(-2, keepdim=True))


@checked
def eigenvectors(matrix: Float[Tensor, "*N D D"]) -> Float[Tensor, "*N D D"]:
    """Eigenvectors of symmetric matrices [..., D, D] as columns, by falling eigenvalue.

    The largest entry of each is positive, so that machines agree on the signs.
    """
    vectors = torch.linalg.eigh(matrix).eigenvectors.flip(-1)
    top = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    return vectors * torch.where(top < 0, -1.0, 1.0)
