"""Codecs: tensor -> codes and metadata -> tensor. They have never seen a model.

A codec is a base (``affine``, ``book``, ``float8``, ``float4``, ``sketch``) that further codecs may wrap, each of which
adds its own sections: ``permute``, ``norm``, ``signs``, ``low_rank``, ``outliers``, in this order from the inside.
"""

from collections.abc import Mapping

import torch

from kvq.codec_specs import CodecSpec
from kvq.codecs.affine import AffineCodec
from kvq.codecs.book import BookCodec
from kvq.codecs.float4 import Float4Codec
from kvq.codecs.float8 import Float8Codec
from kvq.codecs.grouping import Grouping
from kvq.codecs.levels import make_levels, midpoints
from kvq.codecs.low_rank import LowRankCodec
from kvq.codecs.norm import NormedCodec
from kvq.codecs.outliers import SparseCodec, outlier_count
from kvq.codecs.packed import Codec, Encoded, PackedKV
from kvq.codecs.permute import PermutedCodec
from kvq.codecs.signs import SignedCodec
from kvq.codecs.sketch import SketchCodec
from kvq.codecs.tiers import TiersCodec
from kvq.errors import RecipeError

__all__ = [
    "CODECS",
    "AffineCodec",
    "BookCodec",
    "Codec",
    "Encoded",
    "Float4Codec",
    "Float8Codec",
    "PackedKV",
    "SketchCodec",
    "TiersCodec",
    "build_codec",
    "codec_tensors",
]

CODECS = {
    "affine": AffineCodec,
    "book": BookCodec,
    "float8": Float8Codec,
    "float4": Float4Codec,
    "sketch": SketchCodec,
    "tiers": TiersCodec,
}


def codec_tensors(spec: CodecSpec, head_dim: int, heads: int) -> dict[str, tuple[int, ...]]:
    """Shapes by name of what calibration must make for a codec (``kvq.calib.artefacts`` says what each is)."""
    found: dict[str, tuple[int, ...]] = {}
    if spec.scale == "calibrated":
        scales = (heads,) if spec.granularity == "head" else ()
        found |= {"range": (heads, head_dim, 2)} if spec.codec == "book" else {"scale": scales}
    if spec.levels == "calibrated":
        found |= {"levels": (2**spec.bits,), "edges": (2**spec.bits - 1,)}
    if spec.permute is not None:
        found["order"] = (heads, head_dim)
    return found


def build_codec(
    spec: CodecSpec, head_dim: int, artefacts: Mapping[str, torch.Tensor] | None = None, heads: int = 1
) -> Codec:
    """Build the codec of a recipe's key or value for one head dimension.

    artefacts   what calibration made for this codec, by name (``kvq.calib.artefacts``); a codec has one scale.
    heads       KV heads that are stored together; some codecs share numbers among them.
    """
    codec = base = _base(spec, head_dim, artefacts or {})
    if spec.permute is not None:
        codec = PermutedCodec(inner=codec, order=artefacts["order"])
    if spec.norm is not None:
        codec = NormedCodec(inner=codec, over=spec.norm.over, correct=spec.norm.correct)
    if spec.signs is not None:
        codec = SignedCodec(inner=codec, seed=spec.signs.seed)
    if spec.low_rank is not None:
        part = spec.low_rank
        codec = LowRankCodec(inner=codec, rank=part.rank, block=part.block, form=part.format)
    if spec.outliers is not None:
        along = spec.outliers.along
        length = heads * head_dim if along == "token" else codec.block_tokens
        static = base if spec.codec == "book" and spec.scale == "calibrated" and along == "token" else None
        codec = SparseCodec(
            inner=codec, count=outlier_count(spec.outliers.share, length), along=along, heads=heads, static=static
        )
    return codec


def _base(spec: CodecSpec, head_dim: int, artefacts: Mapping[str, torch.Tensor]) -> Codec:
    if spec.codec == "float8":
        scale = float(artefacts["scale"]) if spec.scale == "calibrated" else 1.0
        return Float8Codec(head_dim=head_dim, scale=scale)
    if spec.codec == "float4":
        if head_dim % spec.group:
            raise RecipeError(f"a float4 block of {spec.group} channels does not divide head_dim={head_dim}.")
        scale = float(artefacts["scale"]) if spec.scale == "calibrated" else 1.0
        return Float4Codec(head_dim=head_dim, block=spec.group, meta=spec.meta, scale=scale)
    if spec.codec == "sketch":
        return SketchCodec(
            bits=spec.bits,
            head_dim=head_dim,
            seed=spec.seed or 0,
            outlier_channels=spec.outlier_channels or 0,
            outlier_bits=spec.outlier_bits or 0,
            group=spec.group or 1,
        )
    if spec.codec == "book":
        return _book(spec, head_dim, artefacts)
    if spec.codec == "tiers":
        clip = spec.clip if isinstance(spec.clip, tuple) else (spec.clip,) * len(spec.bits) if spec.clip else ()
        return TiersCodec(bits=spec.bits, group=spec.group, head_dim=head_dim, meta=spec.meta or "float16", clip=clip)
    return AffineCodec(
        bits=spec.bits,
        axis=spec.axis,
        group=spec.group_size(head_dim),
        head_dim=head_dim,
        clip=spec.clip or 1.0,
        symmetric=bool(spec.symmetric),
        meta=spec.meta or "float16",
        shared=spec.group == "token",
    )


def _book(spec: CodecSpec, head_dim: int, artefacts: Mapping[str, torch.Tensor]) -> BookCodec:
    if spec.levels == "calibrated":
        levels, edges = artefacts["levels"].double(), artefacts["edges"].double()
    else:
        levels = make_levels(spec.levels, spec.bits, unit_range=spec.scale not in ("unit", "moments"))
        edges = midpoints(levels)
    grouped = spec.axis is not None
    grouping = Grouping(
        axis=spec.axis or "token",
        group=spec.group_size(head_dim) if grouped else head_dim,
        head_dim=head_dim,
        shared=spec.group == "token",
    )
    static = artefacts["range"].double() if spec.scale == "calibrated" else None
    return BookCodec(
        bits=spec.bits,
        head_dim=head_dim,
        levels=levels,
        edges=edges,
        scale=spec.scale,
        grouping=grouping,
        static=static,
    )
