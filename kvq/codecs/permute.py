"""Channels that change places before another codec, so that channels of like range share a group (SKVQ, 2405.06219).

Channels move among all heads that are stored together: what the inner codec sees as head j, channel c is channel
``order[j, c]`` of the heads side by side. The published groups are k-means clusters of unequal size; here all have the
inner codec's group size, so pages stay as they are.
"""

import dataclasses
from dataclasses import dataclass

import torch

from kvq.codecs.packed import Codec, Encoded, PackedKV, dequantized_scores, dequantized_sum
from kvq.codecs.wrapping import heads_apart, heads_together
from kvq.pages.layout import SideLayout


@dataclass(frozen=True, kw_only=True, eq=False)
class PermutedCodec:
    """order: [K, head_dim], a permutation of the K * head_dim channels."""

    inner: Codec
    order: torch.Tensor

    @property
    def head_dim(self) -> int:
        return self.inner.head_dim

    @property
    def block_tokens(self) -> int:
        return self.inner.block_tokens

    @property
    def page_tokens(self) -> int:
        return self.inner.page_tokens

    def layout(self, page_tokens: int) -> SideLayout:
        return dataclasses.replace(self.inner.layout(page_tokens), permuted=True)

    def encode(self, x: torch.Tensor) -> Encoded:
        """Encode x [..., K, T, head_dim]; codes and sections are of the permuted channels."""
        return self.inner.encode(self.moved(x))

    def decode(self, encoded: Encoded, dtype: torch.dtype) -> torch.Tensor:
        """The numbers in the order of the model's channels, [..., K, T, head_dim]."""
        return self.moved_back(self.inner.decode(encoded, dtype))

    def moved(self, x: torch.Tensor) -> torch.Tensor:
        """x with its channels where the inner codec sees them."""
        return self._taken(x, self.order.flatten())

    def moved_back(self, x: torch.Tensor) -> torch.Tensor:
        """Inverse of ``moved``."""
        return self._taken(x, self.order.flatten().argsort())

    def _taken(self, x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        return heads_apart(heads_together(x)[..., order.to(x.device, torch.long)], self.head_dim)

    # A stored head mixes channels of all heads, so there is no product that stays within one.
    def scores(self, packed: PackedKV, q: torch.Tensor) -> torch.Tensor:
        return dequantized_scores(packed, q)

    def weighted_sum(self, packed: PackedKV, p: torch.Tensor) -> torch.Tensor:
        return dequantized_sum(packed, p)
