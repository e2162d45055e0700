"""Keys: a scale and an angle by rotary pair and KV head, exp(l + i t), under Adam.

OmniQuant (arXiv 2308.13137), kept exact.
"""

import torch

from kvq.transforms.align import pair_numbers, pairs_of
from kvq.transforms.fit_data import FitData
from kvq.transforms.learned import Adam, Dense, LearnedSpec
from kvq.transforms.spec import PAIRS, register_transform
from kvq.transforms.steps import Pairs


class PairsInTheMaking(Adam):
    def __init__(self, data: FitData):
        heads = 1 if data.shared else data.heads
        self.data = data
        # One number a pair: that of its first channel.
        self.first = torch.where(data.second, data.partner, torch.arange(len(data.partner)))
        self.alone = data.partner == torch.arange(len(data.partner))
        shape = (heads, len(data.partner))
        super().__init__([torch.zeros(shape), torch.zeros(shape)], lr=0.02)

    def numbers(self) -> dict[str, torch.Tensor]:
        logs, angles = (p.index_select(-1, self.first).expand(self.data.heads, -1) for p in self.parameters)
        # A norm that heads share takes only scales.
        angles = torch.where(self.alone | torch.tensor(self.data.shared), 0.0, angles)
        return pair_numbers(logs.exp() * angles.cos(), logs.exp() * angles.sin(), self.data)

    def step(self) -> Dense:
        # As matrices: gradients of gathered channels are slow.
        pairs, unit = Pairs(**self.numbers()), torch.eye(len(self.first)).expand(self.data.heads, -1, -1)
        return Dense(pairs.forward(unit), pairs.inverse(unit))


@register_transform("learned_pairs")
class LearnedPairsSpec(LearnedSpec):
    """A scale and an angle by rotary pair."""

    sides = ("key",)
    tensors = PAIRS
    commutes_with_rope = works_on_channels = True

    def learnable(self, data: FitData) -> PairsInTheMaking:
        return PairsInTheMaking(data)

    def build(self, head_dim, tensors) -> Pairs:
        return pairs_of(tensors)
