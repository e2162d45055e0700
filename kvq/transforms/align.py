"""Turn rotary pairs so that what is static in keys costs no range.

Keys have large means, mostly in slowly turning pairs. With m = m_a + i m_b the mean of a pair, after

    c = exp(i (pi / 4 - arg m))          (a channel without partner: c = -1 where its mean is negative)

both halves of every pair have the mean |m| / sqrt(2): all means are positive. Codes span maximum minus minimum of a
token, and a common offset of its channels is stored in the minimum at no cost. An angle by pair commutes with RoPE
(a rotation of the same plane), so that it folds into the projections of keys and queries.
"""

import math
from collections.abc import Mapping

import torch

from kvq.transforms.fit_data import FitData
from kvq.transforms.spec import PAIRS, TransformSpec, register_transform
from kvq.transforms.steps import Pairs


@register_transform("align")
class AlignSpec(TransformSpec):
    """Keys: turn every rotary pair so that its mean has two equal halves."""

    sides = ("key",)
    tensors = PAIRS
    commutes_with_rope = works_on_channels = True

    def needs(self, side):
        return ["key.range"]

    def fit(self, data: FitData) -> dict[str, torch.Tensor]:
        return aligning(data)

    def build(self, head_dim, tensors) -> Pairs:
        return pairs_of(tensors)


def aligning(data: FitData) -> dict[str, torch.Tensor]:
    """``real``, ``imaginary`` [K, D] and ``partner`` [D], as ``Pairs`` takes them."""
    mean, partner, second = data.mean("key"), data.partner, data.second
    alone = partner == torch.arange(len(partner))
    other = mean.index_select(-1, partner)
    first, last = torch.where(second, other, mean), torch.where(second, mean, other)
    angle = math.pi / 4 - torch.atan2(last, first)
    real = torch.where(alone, torch.where(mean < 0, -1.0, 1.0), angle.cos())
    return pair_numbers(real, torch.where(alone, 0.0, angle.sin()), data)


def pair_numbers(real: torch.Tensor, imaginary: torch.Tensor, data: FitData) -> dict[str, torch.Tensor]:
    """Artefacts of ``Pairs`` for numbers [K, D] that both channels of a pair share."""
    imaginary = torch.where(data.second, -imaginary, imaginary)
    return {"real": real.float(), "imaginary": imaginary.float(), "partner": data.partner}


def pairs_of(tensors: Mapping[str, torch.Tensor]) -> Pairs:
    return Pairs(tensors["real"], tensors["imaginary"], tensors["partner"].long())
