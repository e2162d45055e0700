"""What a codebook is learned from: the numbers that a codec compares with its levels."""

import torch

from kvq.codecs.book import BookCodec
from kvq.codecs.low_rank import LowRankCodec
from kvq.codecs.norm import NormedCodec
from kvq.codecs.outliers import SparseCodec
from kvq.codecs.packed import Codec
from kvq.codecs.permute import PermutedCodec
from kvq.codecs.signs import SignedCodec


def normalised(codec: Codec, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For x [..., K, T, head_dim]: what is compared with the levels, and by how much it was divided; like x.

    NaN stands for numbers that are stored beside the codes.
    """
    if isinstance(codec, BookCodec):
        return codec.normalised(x), codec.scales(x)
    if isinstance(codec, SparseCodec):
        filled, index = codec.split(x)
        numbers, scale = normalised(codec.inner, filled)
        return codec.masked(numbers, index), scale
    if isinstance(codec, NormedCodec):
        unit, size = codec.unit(x)
        numbers, scale = normalised(codec.inner, unit)
        return numbers, scale * size.expand_as(scale)
    if isinstance(codec, PermutedCodec):
        numbers, scale = normalised(codec.inner, codec.moved(x))
        return codec.moved_back(numbers), codec.moved_back(scale)
    assert isinstance(codec, LowRankCodec | SignedCodec), codec
    return normalised(codec.inner, x)
