"""A block of tokens as a large tensor that is quantized and a small one that is not (DecoQuant, arXiv 2405.12591).

The block's n D numbers are the rows of a matrix of ``size`` columns, X. Of its singular value decomposition U S V^T

    A = sqrt(rows) U       large, columns of variance 1, what the codec inside stores
    B = S V^T / sqrt(rows)  small, size x size, in fp16

X = A B at full rank, so all that is lost is what the codec loses of A: outliers are in B. This is the paper's matrix
product operator of two tensors; it depends on the block alone. Computed in float64, so that neighbours in a batch do
not show.
"""

from dataclasses import dataclass

import torch

from kvq.codecs.base import WrappingCodec
from kvq.codecs.spec import BLOCK_TOKENS, PartSpec, register_part
from kvq.codecs.wrapping import with_sections
from kvq.errors import RecipeError
from kvq.pages.affine import refuse_unstorable, wide
from kvq.pages.layout import Section, SideLayout
from kvq.pages.pages import Encoded
from kvq.settings import check_choice

# Singular values below this share of the largest are rounding: their columns of A are zero.
_NOTHING = 1e-10


@dataclass(frozen=True, kw_only=True)
class DecomposedCodec(WrappingCodec):
    """part: columns of the matrix, and tokens of a block (a multiple of the inner codec's)."""

    part: "Decomposed"

    @property
    def own_block_tokens(self) -> int:
        return self.part.block

    def layout(self, page_tokens: int) -> SideLayout:
        size = self.part.size
        return with_sections(
            self.inner.layout(page_tokens), Section(name="small", shape=(size, size), tokens=self.part.block)
        )

    def encode(self, x: torch.Tensor) -> Encoded:
        """Encode x [..., K, T, head_dim]; adds ``small`` [..., K, T / block, size, size]."""
        x = wide(x)
        refuse_unstorable("float16", x)
        rows = self._rows(x.double())
        values, vectors = torch.linalg.eigh(rows.transpose(-1, -2) @ rows)
        deviation = (values.clamp_min(0) / rows.shape[-2]).sqrt()
        deviation = deviation.masked_fill(deviation <= _NOTHING * deviation.amax(-1, keepdim=True), 0)
        small = deviation.unsqueeze(-1) * vectors.transpose(-1, -2)
        refuse_unstorable("float16", small)
        large = (rows @ vectors) / deviation.masked_fill(deviation == 0, torch.inf).unsqueeze(-2)
        encoded = self.inner.encode(self._tokens(large).to(x.dtype))
        return Encoded(codes=encoded.codes, sections={**encoded.sections, "small": small.half()})

    def decode(self, encoded: Encoded, dtype: torch.dtype) -> torch.Tensor:
        """The stored numbers, [..., K, T, head_dim]."""
        return self._tokens(self._rows(self.inner.decode(encoded, dtype)) @ encoded.sections["small"].to(dtype))

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        """[..., T, D] to [..., blocks, block * D / size, size]."""
        return x.unflatten(-1, (-1, self.part.size)).unflatten(-3, (-1, self.part.block)).flatten(-3, -2)

    def _tokens(self, rows: torch.Tensor) -> torch.Tensor:
        """Inverse of ``_rows``."""
        return rows.unflatten(-2, (self.part.block, -1)).flatten(-2).flatten(-3, -2)


@register_part("decomposed")
@dataclass(frozen=True, kw_only=True)
class Decomposed(PartSpec):
    """The codec stores the large factor of a block, whose small one is exact (DecoQuant, arXiv 2405.12591).

    size    of the small factor, 2, 4, 8 or 16: 16 size^2 / (block head_dim) bits a number.
    block   tokens of a block, which is quantized as a whole.
    """

    size: int
    block: int

    order = 25

    def __post_init__(self):
        check_choice("decomposed.size", self.size, (2, 4, 8, 16))
        check_choice("decomposed.block", self.block, BLOCK_TOKENS)

    @property
    def block_tokens(self) -> int:
        return self.block

    def check_codec(self, spec) -> None:
        if spec.is_calibrated:
            raise RecipeError(
                "decomposed changes the numbers that calibration would measure for the codec: remove one of them."
            )

    def wrap(self, inner, *, base, artefacts, heads) -> DecomposedCodec:
        return DecomposedCodec(inner=inner, part=self)
