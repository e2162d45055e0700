"""What compiled kernels must know of a codec: one description for all of them, of numbers alone."""

from dataclasses import dataclass
from typing import Protocol

from kvq.pages.layout import SideLayout


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Neighbouring channels of a head that one grid stores.

    layout   of a block of tokens of these channels. prefix: of the names of its sections in the page.
    first    its first channel. clip: the share of a group's range that its codes span.
    """

    layout: SideLayout
    prefix: str = ""
    first: int = 0
    clip: float = 1.0


@dataclass(frozen=True, kw_only=True)
class View:
    """A side's numbers: those that the codes of its slices name, times ``scale`` and the token's norm.

    encoding  how codes are chosen: ``minmax`` (affine between a group's ends), ``symmetric``, ``unit`` (levels alone),
              ``absmax``, ``range`` (levels between a group's ends), ``e2m1``, ``cast`` (E4M3), or "": in torch alone.
    levels, edges   of a book: what codes name, and where one ends and the next begins.
    statics   of every head, scales and offsets of its channels, [heads, 2, head_dim], or nothing.
    low_rank  (rank, tokens of a block) of factors beside the codes; outliers: (numbers of a vector, tokens of a block,
              or 0 where a vector is a token of all heads). These are added to what the codes name.
    norm, correct   what shares a token's length, ``head`` or ``token``, and the number that is stored (``Norm``).
    """

    slices: tuple[Slice, ...]
    encoding: str
    scale: float = 1.0
    levels: tuple[float, ...] = ()
    edges: tuple[float, ...] = ()
    statics: tuple[tuple[tuple[float, ...], ...], ...] = ()
    low_rank: tuple[int, int] | None = None
    outliers: tuple[int, int] | None = None
    norm: str | None = None
    correct: str | None = None


class Viewed(Protocol):
    """A codec, as kernels know it."""

    def view(self, page_tokens: int) -> View | str:
        """All that a compiled kernel must know of the codec in pages of so many tokens, or why that is not all."""
        ...
