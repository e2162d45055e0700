"""Codecs: tensor -> codes and metadata -> tensor. They have never seen a model."""

from kvq.quantizers.affine import AffineCodec
from kvq.quantizers.float8 import Float8Codec
from kvq.quantizers.packed import Codec, PackedKV
from kvq.recipe import CodecSpec

__all__ = ["CODECS", "AffineCodec", "Codec", "Float8Codec", "PackedKV", "build_codec"]

CODECS = {"affine": AffineCodec, "float8": Float8Codec}


def build_codec(spec: CodecSpec, head_dim: int, scale: float = 1.0) -> Codec:
    """Build the codec of a recipe's key or value for one head dimension. ``scale``: static scale of float8."""
    if spec.codec == "float8":
        return Float8Codec(head_dim=head_dim, scale=scale)
    return AffineCodec(bits=spec.bits, axis=spec.axis, group=spec.group_size(head_dim), head_dim=head_dim)
