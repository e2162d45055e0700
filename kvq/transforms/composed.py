"""A chain as one product: what a decode step applies, where calls count and not multiplications.

Every step is affine, x' = x P + m by head, so a chain is too. P and m are composed in float64 from the tensors of the
steps.
"""

from typing import Any

import torch

from kvq.kernels.cpp.product import product, serves


class Composed:
    """The ways of ``chain`` through ``heads`` KV heads of ``head_dim`` channels, each made when it is first gone."""

    def __init__(self, chain: Any, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype):
        self.chain, self.heads, self.head_dim, self.device = chain, heads, head_dim, device
        self.dtype = dtype if dtype == torch.float64 else torch.float32
        self._maps: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What is stored for x [B, K, T, D], contiguous."""
        return self._through(x, "forward")

    def transform_query(self, q: torch.Tensor) -> torch.Tensor:
        return self._through(q, "transform_query")

    def inverse(self, x: torch.Tensor) -> torch.Tensor:
        return self._through(x, "inverse")

    def _through(self, x: torch.Tensor, direction: str) -> torch.Tensor:
        if not self.chain:
            return x
        if direction not in self._maps:
            self._maps[direction] = self._map(direction)
        matrix, offset = self._maps[direction]
        if serves(x):
            return product(x, matrix, offset)
        B, K, M, D = x.shape
        # Head by head, so that a batch repeats no matrix; the changes of order cost nothing beside those of dtype.
        wide = x.transpose(0, 1).to(self.dtype, memory_format=torch.contiguous_format).reshape(K, B * M, D)
        wide = torch.bmm(wide, matrix) if offset is None else torch.baddbmm(offset, wide, matrix)
        out = wide.view(K, B, M, D).transpose(0, 1)
        if out.dtype == x.dtype:
            return out.contiguous()
        return out.to(x.dtype, memory_format=torch.contiguous_format)

    def _map(self, direction: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(P [K, D, D], m [K, 1, D] or None) of x' = x P + m."""
        # A forward in inference mode must not leave tensors that training cannot use.
        with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
            unit = torch.eye(self.head_dim, dtype=torch.float64).expand(self.heads, -1, -1)
            go = getattr(self.chain, direction)
            offset = go(torch.zeros_like(unit[:, :1]))
            matrix = go(unit) - offset
            moved = matrix.to(self.device, self.dtype).contiguous()
            return moved, offset.to(self.device, self.dtype) if offset.any() else None
