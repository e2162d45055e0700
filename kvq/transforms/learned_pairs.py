"""Keys: a scale and an angle by rotary pair and KV head, exp(l + i t), under Adam.

OmniQuant (arXiv 2308.13137), kept exact.
"""

import torch

from kvq.transforms.align import pair_numbers, pairs_of
from kvq.transforms.evidence import Evidence
from kvq.transforms.learned import Adam, Dense, LearnedSpec
from kvq.transforms.spec import PAIRS, register_transform
from kvq.transforms.steps import Pairs


class PairsInTheMaking(Adam):
    def __init__(self, evidence: Evidence):
        heads = 1 if evidence.shared else evidence.heads
        self.evidence = evidence
        # One number a pair: that of its first channel.
        self.first = torch.where(evidence.second, evidence.partner, torch.arange(len(evidence.partner)))
        self.alone = evidence.partner == torch.arange(len(evidence.partner))
        shape = (heads, len(evidence.partner))
        super().__init__([torch.zeros(shape), torch.zeros(shape)], lr=0.02)

    def numbers(self) -> dict[str, torch.Tensor]:
        logs, angles = (p.index_select(-1, self.first).expand(self.evidence.heads, -1) for p in self.parameters)
        # A norm that heads share takes only scales.
        angles = torch.where(self.alone | torch.tensor(self.evidence.shared), 0.0, angles)
        return pair_numbers(logs.exp() * angles.cos(), logs.exp() * angles.sin(), self.evidence)

    def step(self) -> Dense:
        # As matrices: gradients of gathered channels are slow.
        pairs, unit = Pairs(**self.numbers()), torch.eye(len(self.first)).expand(self.evidence.heads, -1, -1)
        return Dense(pairs.write(unit), pairs.undo(unit))


@register_transform("learned_pairs")
class LearnedPairsSpec(LearnedSpec):
    """A scale and an angle by rotary pair."""

    sides = ("key",)
    tensors = PAIRS
    commutes_with_rope = works_on_channels = True

    def learnable(self, evidence: Evidence) -> PairsInTheMaking:
        return PairsInTheMaking(evidence)

    def build(self, head_dim, tensors) -> Pairs:
        return pairs_of(tensors)
