"""Keys or values without the mean of every channel (Outlier Suppression+, arXiv 2304.09145).

A mean that all tokens share adds one number to all logits of a query, which the softmax takes away, and is added again
to what attention gives of values, whose weights sum to one.
"""

from typing import ClassVar

import torch

from kvq.models.architecture import Attention
from kvq.transforms.fit_data import FitData
from kvq.transforms.spec import TransformSpec, register_transform
from kvq.transforms.steps import Shift


@register_transform("shift")
class ShiftSpec(TransformSpec):
    """Subtract the mean of every channel, over all tokens measured."""

    tensors: ClassVar = {"mean": "KD"}
    takes_mean = True

    def needs(self, side):
        return [f"{side}.range"]

    def inexact(self, side: str, attention: Attention) -> str | None:
        if attention.sinks:
            return "learned sink logits, which take a share of every softmax"
        if side == "key" and attention.softcap is not None:
            return "a logit softcap, which bends what a shift of keys adds"
        return None

    def fit(self, data: FitData) -> dict[str, torch.Tensor]:
        return {"mean": data.mean(data.side).float()}

    def build(self, head_dim, tensors) -> Shift:
        return Shift(tensors["mean"])
