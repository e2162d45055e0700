"""Codecs: tensor -> codes and metadata -> tensor. They have never seen a model."""

from collections.abc import Mapping

import torch

from kvq.quantizers.affine import AffineCodec
from kvq.quantizers.float8 import Float8Codec
from kvq.quantizers.packed import Codec, Encoded, PackedKV
from kvq.specs import CodecSpec

__all__ = ["CODECS", "AffineCodec", "Codec", "Encoded", "Float8Codec", "PackedKV", "build_codec"]

CODECS = {"affine": AffineCodec, "float8": Float8Codec}


def build_codec(spec: CodecSpec, head_dim: int, artefacts: Mapping[str, torch.Tensor] | None = None) -> Codec:
    """Build the codec of a recipe's key or value for one head dimension.

    artefacts   what calibration made for this codec, by name: ``scale`` for calibrated float8.
    """
    if spec.codec == "float8":
        scale = float(artefacts["scale"]) if spec.scale == "calibrated" else 1.0
        return Float8Codec(head_dim=head_dim, scale=scale)
    group = spec.group_size(head_dim)
    return AffineCodec(bits=spec.bits, axis=spec.axis, group=group, head_dim=head_dim, clip=spec.clip or 1.0)
