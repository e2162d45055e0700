"""What codecs are: numbers to codes and sections, and back. They have never seen a model."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvq.pages.layout import DEFAULT_PAGE_TOKENS, SideLayout
from kvq.pages.pages import Encoded, Pages
from kvq.pages.view import View
from kvq.shapes import Float, held_to


@dataclass(frozen=True, kw_only=True)
class StaticNumbers:
    """What a kernel must know of a codec besides the page layout: numbers that are the same for all pages.

    scale: static factor of all numbers. levels: what the codes of a book name, or None.
    Decoded numbers are those of the layout's codes and sections, times ``scale``.
    """

    scale: float = 1.0
    levels: tuple[float, ...] | None = None


class Codec(ABC):
    """Chooses numbers for one head dimension; a derived class has ``layout``, ``encode`` and ``decode`` at least.

    head_dim   channels of a head.
    """

    head_dim: int

    @property
    def names_heads(self) -> bool:
        """True if it has numbers for each of several heads, or mixes their channels: it takes all heads at once."""
        return False

    @property
    def block_tokens(self) -> int:
        """The smallest number of consecutive tokens that can be encoded alone."""
        return 1

    @property
    def page_tokens(self) -> int:
        """The smallest page that holds whole blocks."""
        return max(DEFAULT_PAGE_TOKENS, self.block_tokens)

    @abstractmethod
    def layout(self, page_tokens: int) -> SideLayout:
        """The page layout of what ``encode`` gives."""

    def __init_subclass__(cls, **settings: Any) -> None:
        """Every codec keeps the shapes of the two signatures below."""
        super().__init_subclass__(**settings)
        for name in {"encode", "decode"} & vars(cls).keys():
            setattr(cls, name, held_to(getattr(Codec, name), vars(cls)[name]))

    @abstractmethod
    def encode(self, x: Float[Tensor, "*B T {self.head_dim}"]) -> Encoded:
        """Encode x [..., K, T, D], whole blocks. Codes do not depend on batch neighbours or on later tokens."""

    @abstractmethod
    def decode(self, encoded: Encoded, dtype: torch.dtype) -> Float[Tensor, "*B T {self.head_dim}"]:
        """The numbers that the codes stand for, [..., K, T, D]."""

    def dequantized(self, pages: Pages, side: str, dtype: torch.dtype) -> torch.Tensor:
        """The numbers of one side of pages, [B, K, P * page_tokens, D]."""
        return self.decode(pages.encoded(side), dtype)

    def scores(self, pages: Pages, side: str, q: torch.Tensor) -> torch.Tensor:
        """Products of q [B, K, M, D] with every token of one side of pages, [B, K, M, T]; here: decode and multiply."""
        return q @ self.dequantized(pages, side, q.dtype).transpose(-1, -2)

    def weighted_sum(self, pages: Pages, side: str, p: torch.Tensor) -> torch.Tensor:
        """sum_t p[..., t] * token t, [B, K, M, D]; here: decode, then multiply."""
        return p @ self.dequantized(pages, side, p.dtype)

    def static_numbers(self) -> StaticNumbers | str:
        """The static numbers of the codec, or why layout and such numbers do not say all that its codes mean."""
        return f"codec {type(self).__name__.removesuffix('Codec').lower()!r}"

    def view(self, page_tokens: int) -> View | str:
        """All that a compiled kernel must know of the codec in pages of so many tokens, or why that is not all."""
        return f"codec {type(self).__name__.removesuffix('Codec').lower()!r}"

    def compared(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For x [..., K, T, D]: what is compared with the levels of a codebook, and by how much it was divided; like x.

        NaN stands for numbers that are stored beside the codes.
        """
        raise NotImplementedError(f"{type(self).__name__} has no levels")

    def fake_quantized(self, x: torch.Tensor) -> torch.Tensor:
        """What ``decode`` gives back for x [..., T, D], with gradients, here straight through all of it."""
        return x + (self.decode(self.encode(x.detach()), x.dtype) - x.detach())


@dataclass(frozen=True, kw_only=True)
class WrappingCodec(Codec):
    """A codec around ``inner``, whose sections it passes on."""

    inner: Codec

    @property
    def head_dim(self) -> int:
        return self.inner.head_dim

    @property
    def names_heads(self) -> bool:
        return self.inner.names_heads

    @property
    def own_block_tokens(self) -> int:
        """Consecutive tokens that what wraps needs together."""
        return 1

    @property
    def block_tokens(self) -> int:
        return max(self.own_block_tokens, self.inner.block_tokens)

    @property
    def page_tokens(self) -> int:
        return max(self.own_block_tokens, self.inner.page_tokens)

    def compared(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inner.compared(x)
