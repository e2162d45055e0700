"""Orthogonal matrices by gradients: Cayley SGD, and the Cayley transform of a skew matrix.

Cayley SGD (Li, Fuxin, Todorovic, "Efficient Riemannian optimization on the Stiefel manifold via the Cayley transform",
arXiv 2002.01113; SpinQuant, arXiv 2405.16406) walks along the manifold: with X [D, D] of orthonormal rows, G the
gradient of the loss by X, and momentum 0,

    V = -G^T,   A = V X,   B = A - X^T (X A) / 2,   W = B - B^T,   a = min(lr, 1 / ||W||_1)
    Y <- X^T + a V,  then five times  Y <- X^T + (a / 2) W (X^T + Y),   X <- Y^T
"""

import torch
from torch import Tensor

from kvq.shapes import Float, checked

_ITERATIONS = 5


@torch.no_grad()
@checked
def cayley_step(x: Float[Tensor, "*N D D"], gradient: Float[Tensor, "*N D D"], lr: float) -> Float[Tensor, "*N D D"]:
    """One step for matrices x [..., D, D] with orthonormal rows; returns the next ones."""
    transposed = x.transpose(-1, -2)
    direction = -gradient.transpose(-1, -2)
    a = direction @ x
    b = a - 0.5 * transposed @ (x @ a)
    skew = b - b.transpose(-1, -2)
    # The largest column sum bounds the spectral norm, so that the fixed point below exists.
    norm = skew.abs().sum(-2).amax(-1).clamp_min(torch.finfo(x.dtype).tiny)
    step = (1 / norm).clamp_max(lr)[..., None, None]
    y = transposed + step * direction
    for _ in range(_ITERATIONS):
        y = transposed + step / 2 * skew @ (transposed + y)
    return y.transpose(-1, -2)


@checked
def orthonormal(x: Float[Tensor, "*N D D"]) -> Float[Tensor, "*N D D"]:
    """The nearest matrix with orthonormal rows in the sense of QR, with the signs of x; takes out rounding."""
    q, r = torch.linalg.qr(x.transpose(-1, -2))
    return (q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)).transpose(-1, -2)


@checked
def cayley(skew: Float[Tensor, "*N D D"]) -> Float[Tensor, "*N D D"]:
    """(I + S)^-1 (I - S) of skew matrices [..., D, D]: orthogonal, and the identity at 0."""
    unit = torch.eye(skew.shape[-1], dtype=skew.dtype)
    return torch.linalg.solve(unit + skew, unit - skew)
