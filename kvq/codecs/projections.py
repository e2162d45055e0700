"""Signs of random projections: what QJL (arXiv 2406.03482) and TurboQuant's residual term have in common.

With S [D, m], whose columns are random directions of length sqrt(D), the m signs of S^T x and the length of x give

    x ~ c ||x|| / m  S sign(S^T x),    1 / c = sqrt(D) E|u_1| for a uniform unit vector u in D dimensions

which is unbiased in every product with a vector. For Gaussian columns c is sqrt(pi / 2); here they are orthogonal
within every D of them, as in the published code, and c is exact for that (sqrt(pi / 2) would be off by 1 / (4 D)).
"""

import math
from functools import lru_cache

import torch


@lru_cache(maxsize=64)
def directions(head_dim: int, count: int, seed: int) -> torch.Tensor:
    """S, float64 [head_dim, count]."""
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for _ in range(-(-count // head_dim)):
        q, r = torch.linalg.qr(torch.randn(head_dim, head_dim, generator=generator, dtype=torch.float64))
        # Signs as if R had a positive diagonal, without which Q is not uniform.
        blocks.append(q * r.diagonal().sign())
    return torch.cat(blocks, dim=1)[:, :count] * math.sqrt(head_dim)


def unbiasing(head_dim: int) -> float:
    """c of the estimate."""
    return math.exp(math.lgamma((head_dim + 1) / 2) - math.lgamma(head_dim / 2)) * math.sqrt(math.pi / head_dim)


def project(x: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """True where S^T x is positive, bool [..., count]; in float64, so that no batch neighbour shows in a sign."""
    return x.double() @ directions(x.shape[-1], count, seed).to(x.device) > 0


def estimate(signs: torch.Tensor, length: torch.Tensor, head_dim: int, seed: int) -> torch.Tensor:
    """x from signs (+1 or -1) [..., count] and lengths [...], in the dtype of ``signs``."""
    count = signs.shape[-1]
    factor = unbiasing(head_dim) / count
    return signs @ directions(head_dim, count, seed).to(signs).T * (factor * length).unsqueeze(-1)


def to_bytes(bits: torch.Tensor) -> torch.Tensor:
    """Bits [..., n] (bool) to bytes [..., n / 8]: bit j of byte i is entry 8 i + j."""
    return (bits.unflatten(-1, (-1, 8)).to(torch.uint8) << _shifts(bits.device)).sum(-1, dtype=torch.uint8)


def from_bytes(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bytes [..., n / 8] to signs +1 and -1 [..., n]."""
    return (packed.unsqueeze(-1) >> _shifts(packed.device) & 1).flatten(-2).to(dtype) * 2 - 1


def _shifts(device: torch.device) -> torch.Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)
