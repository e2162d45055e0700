"""The strongest tokens of each window, for a bounded number of windows."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kvq.calib.observers.base import Statistic

WINDOWS, PER_WINDOW = 256, 4


@dataclass(frozen=True, kw_only=True)
class Tops(Statistic):
    """For the WINDOWS windows of lowest priority number, in that order, their PER_WINDOW strongest tokens, descending.

    priority   int64 [W]
    strength   float32 [W, 4]; -inf where a window has fewer tokens.
    position   int32 [W, 4]: from the first real token of the window.
    token      int32 [W, 4]: token id.
    extra      int32 [W, 4]: what else is known of the token (the channel of a massive activation), else 0.
    """

    priority: torch.Tensor
    strength: torch.Tensor
    position: torch.Tensor
    token: torch.Tensor
    extra: torch.Tensor

    @classmethod
    def observe(
        cls,
        strength: torch.Tensor,
        tokens: torch.Tensor,
        valid: torch.Tensor | None,
        priority: torch.Tensor,
        extra: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> "Tops":
        """Rank tokens by strength [B, T]; tokens [B, T] are ids.

        extra   from columns int64 [B, N] of the strongest tokens to their extra int [B, N].
        """
        strength = strength.float().cpu()
        real = torch.ones(strength.shape, dtype=torch.bool) if valid is None else valid.cpu()
        strength = strength.masked_fill(~real, float("-inf"))
        # Stable: equal strengths rank by position, in every batch.
        top, place = (x[:, :PER_WINDOW] for x in strength.sort(dim=1, descending=True, stable=True))
        rows = {
            "position": (real.int().cumsum(1) - 1).gather(1, place),
            "token": tokens.cpu().gather(1, place),
            "extra": torch.zeros_like(place) if extra is None else extra(place).cpu(),
        }
        pad = (0, PER_WINDOW - top.shape[1])
        rows = {name: torch.nn.functional.pad(x.masked_fill(top.isneginf(), 0).int(), pad) for name, x in rows.items()}
        return cls(
            priority=priority.cpu(), strength=torch.nn.functional.pad(top, pad, value=float("-inf")), **rows
        )._lowest()

    def merge(self, other: "Tops") -> "Tops":
        new = ~torch.isin(other.priority, self.priority)
        joined = {name: torch.cat([x, getattr(other, name)[new]]) for name, x in self.tensors().items()}
        return Tops(**joined)._lowest()

    def _lowest(self) -> "Tops":
        order = self.priority.argsort(stable=True)[:WINDOWS]
        return Tops(**{name: x[order] for name, x in self.tensors().items()})
