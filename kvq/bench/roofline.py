"""What a decode step must move: bytes counted from the page layout, and the time that a copy of them takes."""

import re
from dataclasses import dataclass

from kvq.errors import DataError
from kvq.pages.layout import PageLayout

_SHAPE = re.compile(r"(\d+)x(\d+)(k?)(?:,kv=(\d+))?(?:,g=(\d+))?(?:,d=(\d+))?", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One decode step: sequences, tokens of each, KV heads, query heads of a KV head, head dimension."""

    batch: int
    context: int
    kv_heads: int = 8
    group: int = 4
    head_dim: int = 128

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """``32x32K`` is a batch of 32 with 32,768 tokens; ``,kv=8,g=4,d=128`` may follow, in this order.

        Raises DataError for anything else.
        """
        found = _SHAPE.fullmatch(text.strip())
        if found is None:
            raise DataError(
                f"shape {text!r} is not readable: write BATCHxTOKENS, for example 8x32K or 1x4096,kv=8,g=4."
            )
        batch, context = int(found[1]), int(found[2]) * (1024 if found[3] else 1)
        given = {"kv_heads": found[4], "group": found[5], "head_dim": found[6]}
        shape = cls(batch=batch, context=context, **{k: int(v) for k, v in given.items() if v})
        if (
            min(batch, context, shape.kv_heads, shape.group) < 1
            or shape.head_dim % 16
            or not 16 <= shape.head_dim <= 256
        ):
            raise DataError(f"shape {text!r}: every number is 1 or more, and d a multiple of 16 up to 256.")
        return shape

    def __str__(self) -> str:
        context = f"{self.context // 1024}K" if self.context % 1024 == 0 else str(self.context)
        return f"{self.batch}x{context},kv={self.kv_heads},g={self.group},d={self.head_dim}"

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group


def step_bytes(shape: Shape, layout: PageLayout, itemsize: int, splits: int = 1) -> int:
    """Bytes of one step: whole pages, queries and outputs of ``itemsize`` bytes a number, and partial results in fp32
    that ``splits`` programs of a sequence and KV head write and the merge reads."""
    pages = -(-shape.context // layout.page_tokens)
    cache = shape.batch * pages * (shape.kv_heads * layout.record_bytes + layout.shared_bytes)
    partials = 2 * shape.batch * shape.heads * splits * (4 * shape.head_dim + 8) if splits > 1 else 0
    return cache + _ends(shape, itemsize) + partials


def exact_bytes(shape: Shape, itemsize: int) -> int:
    """The same for a cache of plain numbers."""
    return 2 * shape.batch * shape.kv_heads * shape.context * shape.head_dim * itemsize + _ends(shape, itemsize)


def _ends(shape: Shape, itemsize: int) -> int:
    return 2 * shape.batch * shape.heads * shape.head_dim * itemsize
