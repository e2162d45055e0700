"""A chain as one product: what a decode step applies, where calls count and not multiplications.

Every step is affine, x' = x P + m by head, so a chain is too. P and m are composed in float64 from the tensors of the
steps.
"""

import copy
from typing import Any

import torch

from kvq.kernels.cpp.product import product, serves


class Composed:
    """The ways of ``chain`` through ``heads`` KV heads of ``head_dim`` channels, each made when it is first gone."""

    def __init__(self, chain: Any, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype):
        self.chain, self.heads, self.head_dim, self.device = chain, heads, head_dim, device
        self.dtype = dtype if dtype == torch.float64 else torch.float32
        self._maps: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}
        self._work: dict[tuple, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] | None = None

    def reusing(self) -> "Composed":
        """The same, with memory of its own for results: the next call of a direction overwrites what it gave."""
        found = copy.copy(self)
        found._work = {}
        return found

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
        B, K, M, D = x.shape
        # What a graph of gradients keeps must not be overwritten.
        if self._work is not None and not torch.is_grad_enabled():
            wide, moved, out = self._memory(self._work, x, direction)
            wide.copy_(x.transpose(0, 1))
            rows = wide.view(K, B * M, D)
            if offset is None:
                torch.bmm(rows, matrix, out=moved)
            else:
                torch.baddbmm(offset, rows, matrix, out=moved)
            return out.copy_(moved.view(K, B, M, D).transpose(0, 1))
        if serves(x):
            return product(x, matrix, offset)
        # Head by head, so that a batch repeats no matrix; the changes of order cost nothing beside those of dtype.
        wide = x.transpose(0, 1).to(self.dtype, memory_format=torch.contiguous_format).reshape(K, B * M, D)
        wide = torch.bmm(wide, matrix) if offset is None else torch.baddbmm(offset, wide, matrix)
        out = wide.view(K, B, M, D).transpose(0, 1)
        if out.dtype == x.dtype:
            return out.contiguous()
        return out.to(x.dtype, memory_format=torch.contiguous_format)

    def _memory(self, held: dict, x: torch.Tensor, direction: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For x in another order, for its products, and for the result."""
        key = direction, x.shape, x.dtype
        if key not in held:
            B, K, M, D = x.shape
            # A forward outside of inference mode may write there next.
            with torch.inference_mode(False):
                wide = torch.empty(K, B, M, D, dtype=self.dtype, device=x.device)
                moved = torch.empty(K, B * M, D, dtype=self.dtype, device=x.device)
                held[key] = wide, moved, torch.empty(B, K, M, D, dtype=x.dtype, device=x.device)
        return held[key]

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
