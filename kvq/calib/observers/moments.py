"""Second moments of every head, or of all heads together: sums of outer products of token vectors, optionally weighted
by token."""

from dataclasses import dataclass

import torch

from kvq.calib.observers.base import Statistic

# Tokens whose products are summed in float32 before they enter the float64 sum.
CHUNK_TOKENS = 2048


@dataclass(frozen=True, kw_only=True)
class Moments(Statistic):
    """sum_t w_t x_t x_t^T by head, with w_t = 1 unless weights were given.

    products   [K, D, D] float64; up to 2,048 tokens are multiplied in float32 (float64 data in float64).
    weight     [K] float64: sum of the weights, which is the number of tokens where there were none.
    """

    products: torch.Tensor
    weight: torch.Tensor

    @classmethod
    def observe(cls, x: torch.Tensor, weights: torch.Tensor | None = None) -> "Moments":
        """Measure x [B, K, T, D], weights [B, K, T] or None; padding is left out before, or has weight 0 and no NaN."""
        partial = torch.float64 if x.dtype == torch.float64 else torch.float32
        batch, heads, tokens, channels = x.shape
        products = torch.zeros(heads, channels, channels, dtype=torch.float64, device=x.device)
        # One long product a head is three times as fast as many short ones of strided rows.
        joined = x.transpose(0, 1).flatten(1, 2)
        own = None if weights is None else weights.transpose(0, 1).flatten(1, 2)
        for start in range(0, batch * tokens, CHUNK_TOKENS):
            piece = joined[:, start : start + CHUNK_TOKENS].to(partial)
            left = piece if own is None else piece * own[:, start : start + CHUNK_TOKENS, None].to(partial)
            products += (left.transpose(1, 2) @ piece).double()
        if weights is None:
            weight = torch.full((heads,), float(batch * tokens), dtype=torch.float64, device=x.device)
        else:
            weight = weights.double().sum((0, 2))
        return cls(products=products, weight=weight)

    @property
    def second(self) -> torch.Tensor:
        """Weighted mean of x x^T, [K, D, D] float64; NaN for a head without weight."""
        return self.products / self.weight.masked_fill(self.weight == 0, float("nan"))[:, None, None]

    def grouped(self, kv_heads: int) -> "Moments":
        """From query heads [H, D, D] to the KV heads that they read: a group's heads count as more tokens."""
        products, weight = (x.unflatten(0, (kv_heads, -1)).sum(1) for x in (self.products, self.weight))
        return Moments(products=products, weight=weight)


@dataclass(frozen=True, kw_only=True)
class JointMoments(Moments):
    """The same of the channels of all heads together: ``products`` [1, K D, K D]."""

    @classmethod
    def observe(cls, x: torch.Tensor, weights: torch.Tensor | None = None) -> "JointMoments":
        """Measure x [B, K, T, D] with one weight a token, [B, 1, T] or None."""
        return super().observe(x.transpose(1, 2).flatten(2).unsqueeze(1), weights)
