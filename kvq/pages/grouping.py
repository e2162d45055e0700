"""Which numbers of a tensor share metadata: channels of one token, tokens of one channel, or all heads of one token."""

from dataclasses import dataclass
from functools import lru_cache

import torch

from kvq.pages.layout import SideLayout


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """Groups of x [..., K, T, head_dim]; the leading K is needed only where heads share a group.

    axis     ``token``: ``group`` consecutive channels of one token; ``channel``: ``group`` consecutive tokens of one
             channel.
    shared   axis token: all channels of all heads of a token are one group, and ``group`` is head_dim.
    """

    axis: str
    group: int
    head_dim: int
    shared: bool = False

    @property
    def dim(self) -> int:
        """The dimension of ``split``'s answer that runs over the numbers of a group."""
        return -2 if self.axis == "channel" else -1

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """View x so that dimension ``dim`` runs over the numbers that share metadata."""
        if self.axis == "channel":
            return x.unflatten(-2, (-1, self.group))
        if self.shared:
            return x.transpose(-3, -2).flatten(-2).unsqueeze(-2)
        return x.unflatten(-1, (-1, self.group))

    def join(self, grouped: torch.Tensor) -> torch.Tensor:
        """Inverse of ``split``."""
        if self.axis == "channel":
            return grouped.flatten(-3, -2)
        if self.shared:
            return grouped.squeeze(-2).unflatten(-1, (-1, self.head_dim)).transpose(-3, -2)
        return grouped.flatten(-2)

    def spread(self, meta: torch.Tensor) -> torch.Tensor:
        """One number per group, [..., rows, groups or channels], to what broadcasts against ``split``'s answer."""
        return meta.unsqueeze(self.dim)


@lru_cache(maxsize=256)
def grouping_of(layout: SideLayout) -> Grouping:
    """The groups of a layout's metadata."""
    return Grouping(axis=layout.axis, group=layout.group, head_dim=layout.head_dim, shared=layout.meta_shared)
