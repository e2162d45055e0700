"""Numbers as they are, in 16 bits: for transforms that leave fewer of them (low rank), and nothing else."""

from dataclasses import dataclass

import torch

from kvq.codecs.base import Codec
from kvq.codecs.spec import CodecSpec, register_codec
from kvq.pages.affine import refuse_unstorable, wide
from kvq.pages.layout import Section, SideLayout
from kvq.pages.pages import Encoded


@dataclass(frozen=True, kw_only=True)
class Float16Codec(Codec):
    """head_dim: channels of a head."""

    head_dim: int

    def layout(self, page_tokens: int) -> SideLayout:
        numbers = Section(name="numbers", shape=(self.head_dim,))
        return SideLayout(
            format="sections", bits=0, head_dim=self.head_dim, page_tokens=page_tokens, meta_terms=0, extras=(numbers,)
        )

    def encode(self, x: torch.Tensor) -> Encoded:
        """x [..., K, T, head_dim] in a section; codes are empty. Raises DataError for numbers beyond fp16."""
        x = wide(x)
        refuse_unstorable("float16", x)
        return Encoded(codes=x.new_empty(*x.shape[:-1], 0, dtype=torch.uint8), sections={"numbers": x.half()})

    def decode(self, encoded: Encoded, dtype: torch.dtype) -> torch.Tensor:
        return encoded.sections["numbers"].to(dtype)


@register_codec("float16")
@dataclass(frozen=True, kw_only=True)
class Float16(CodecSpec):
    """No settings: numbers are rounded to fp16, as the latents of low-rank papers are stored."""

    is_wrappable = False

    def bind(self, head_dim, artefacts, heads) -> Float16Codec:
        return Float16Codec(head_dim=head_dim)
