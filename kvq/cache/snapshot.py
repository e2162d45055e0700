"""What one update of a store leaves for the attention that follows it."""

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True, kw_only=True)
class View:
    """What queries [start, stop) of one update read: per side, how many of the stored body tokens are packed."""

    start: int
    stop: int
    packed: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One update: tokens per row that were stored before and came with it, and the exact tokens at hand, [rows, heads,
    any, head_dim]; rows and heads are those of the store.

    ``exact`` is right-aligned: its last token is the newest of every row. Valid until the next update. ``prompt``: how
    many of the tokens are a turn's prompt where the others are a draft that came with it. ``views``: by row, what its
    queries read.
    """

    before: list[int]
    added: list[int]
    exact: dict[str, torch.Tensor]
    views: list[list[View]]
    prompt: int | None = None

    @cached_property
    def spans(self) -> list[tuple[int, int]] | None:
        """(start, stop) of the queries that read one state; None if rows are cut differently."""
        first = [(view.start, view.stop) for view in self.views[0]]
        alike = all(own is self.views[0] or [(v.start, v.stop) for v in own] == first for own in self.views)
        return first if alike else None


@dataclass(frozen=True, kw_only=True)
class TokenSnapshot(Snapshot):
    """One token came to rows that are all alike; ``counts``: what the C++ kernel is told of each."""

    counts: tuple[int, ...]


def group_rows(keys: list) -> list[list[int]]:
    """Rows with equal keys, in order of first appearance."""
    groups: dict = {}
    for row, key in enumerate(keys):
        groups.setdefault(key, []).append(row)
    return list(groups.values())
