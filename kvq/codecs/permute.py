"""Channels that change places before another codec, so that channels of like range share a group (SKVQ, 2405.06219).

Channels move among all heads that are stored together: what the inner codec sees as head j, channel c is channel
``order[j, c]`` of the heads side by side. The published groups are k-means clusters of unequal size; here all have the
inner codec's group size, so pages stay as they are.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch

from kvq.codecs.base import WrappingCodec
from kvq.codecs.spec import Artefact, CodecSpec, Measured, PartSpec, register_part
from kvq.codecs.wrapping import heads_apart, heads_together
from kvq.errors import RecipeError
from kvq.pages.layout import SideLayout
from kvq.pages.pages import Encoded
from kvq.settings import check_choice

KMEANS_ROUNDS = 20


@dataclass(frozen=True, kw_only=True, eq=False)
class PermutedCodec(WrappingCodec):
    """order: [K, head_dim], a permutation of the K * head_dim channels."""

    order: torch.Tensor
    names_heads = True

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

    def compared(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        numbers, scale = self.inner.compared(self.moved(x))
        return self.moved_back(numbers), self.moved_back(scale)

    # A stored head mixes channels of all heads, so no product stays within one: scores and sums decode first.


@register_part("permute")
@dataclass(frozen=True, kw_only=True)
class Permute(PartSpec):
    """Channels change places, so that those of like range share a group (SKVQ, arXiv 2405.06219).

    by   ``range``: balanced k-means over the channels' (minimum, maximum) in calibration.
    """

    by: str

    order = 10

    def __post_init__(self):
        check_choice("permute.by", self.by, ("range",))

    def check_codec(self, spec: CodecSpec) -> None:
        if spec.why_no_channel_groups:
            raise RecipeError(spec.why_no_channel_groups)

    def artefacts(self, head_dim: int, heads: int) -> dict[str, Artefact]:
        """order: [K, head_dim] int32, which channel of the heads side by side is stored in this place."""
        return {"order": Artefact(shape=(heads, head_dim), stand_in=_in_place, wrong=_no_permutation, joint=True)}

    def needs(self, tensor: str):
        return [f"{tensor}.range"]

    def fit(self, measured: Measured, spec: CodecSpec) -> dict[str, torch.Tensor]:
        ends = torch.stack(measured.ends(), dim=-1)
        return {"order": channel_order(ends.flatten(0, 1), spec.group_size(ends.shape[1])).view(ends.shape[:2])}

    def wrap(self, inner, *, base, artefacts, heads) -> PermutedCodec:
        return PermutedCodec(inner=inner, order=artefacts["order"])


def channel_order(ends: torch.Tensor, group: int) -> torch.Tensor:
    """Places of channels so that each ``group`` neighbours have like (minimum, maximum) ``ends`` [n, 2]: int32 [n].

    k-means with clusters of equal size: channels are assigned to centres by the assignment of least total distance, and
    centres move to their channels' mean, from a start by size of the range. (SKVQ's clusters are of any size; equal
    ones keep pages as they are.)
    """
    from scipy.optimize import linear_sum_assignment

    count = len(ends) // group
    start = (ends[:, 1] - ends[:, 0]).argsort(stable=True)
    centres = ends[start].view(count, group, 2).mean(1)
    assigned = None
    for _ in range(KMEANS_ROUNDS):
        distance = (ends[:, None] - centres).square().sum(-1).repeat_interleave(group, dim=1)
        _, slot = linear_sum_assignment(distance.numpy())
        cluster = torch.from_numpy(slot) // group
        if assigned is not None and torch.equal(cluster, assigned):
            break
        assigned = cluster
        centres = torch.stack([ends[cluster == i].mean(0) for i in range(count)])
    return assigned.argsort(stable=True).to(torch.int32)


def _in_place(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(math.prod(shape), dtype=torch.int32).view(shape)


def _no_permutation(tensor: torch.Tensor) -> str | None:
    places = torch.arange(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    return None if torch.equal(tensor.flatten().sort().values, places) else "something else than places of all channels"
