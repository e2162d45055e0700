"""Values: a scale by channel, exp(l), under Adam (OmniQuant, arXiv 2308.13137)."""

import torch

from kvq.transforms.fit_data import FitData
from kvq.transforms.learned import Adam, LearnedSpec
from kvq.transforms.spec import SCALE, register_transform
from kvq.transforms.steps import Diagonal


class ScaleInTheMaking(Adam):
    def __init__(self, data: FitData):
        super().__init__([torch.zeros(data.heads, len(data.partner))], lr=0.02)

    def numbers(self) -> dict[str, torch.Tensor]:
        return {"scale": self.parameters[0].exp()}

    def step(self) -> Diagonal:
        return Diagonal(**self.numbers())


@register_transform("learned_scale")
class LearnedScaleSpec(LearnedSpec):
    """A scale by channel."""

    sides = ("value",)
    tensors = SCALE
    works_on_channels = True

    def learnable(self, data: FitData) -> ScaleInTheMaking:
        return ScaleInTheMaking(data)

    def build(self, head_dim, tensors) -> Diagonal:
        return Diagonal(tensors["scale"])
