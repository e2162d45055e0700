"""Codecs: tensor -> codes and metadata -> tensor. They have never seen a model.

A codec is one file: its settings in a recipe (a ``CodecSpec``) and what encodes and decodes (a ``Codec``). Parts may
wrap it, each a codec around a codec that adds sections of its own (``PartSpec``, ``WrappingCodec``). The modules of
this package register themselves (``kvq.registry``); nothing lists them.
"""

from kvq.codecs.affine import AffineCodec
from kvq.codecs.base import Codec, StaticNumbers, WrappingCodec
from kvq.codecs.float8 import Float8Codec
from kvq.codecs.spec import (
    CODECS,
    PARTS,
    Artefact,
    CodecSpec,
    PartSpec,
    codec_spec,
    merge_codec,
    parse_codec,
    register_codec,
    register_part,
)
from kvq.pages.layout import Section, SideLayout
from kvq.pages.pages import Encoded

__all__ = [
    "CODECS",
    "PARTS",
    "AffineCodec",
    "Artefact",
    "Codec",
    "CodecSpec",
    "Encoded",
    "Float8Codec",
    "PartSpec",
    "Section",
    "SideLayout",
    "StaticNumbers",
    "WrappingCodec",
    "codec_spec",
    "merge_codec",
    "parse_codec",
    "register_codec",
    "register_part",
]
