"""Several continuations of one context in one row: the context is computed once.

A row holds ``context | branch | branch | ...``. Every branch goes on at the position after the context and sees the
context and itself, never its neighbours. What a query reads as stored is a rule on positions; here it becomes a rule on
columns, so that two-view attention needs nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvq.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Branches:
    """contexts int64 [B]: tokens of each row's context. starts int64 [B, T]: the first column of the branch that a
    column belongs to; of a context column, 0. A column c of a branch stands at position ``context + c - start``."""

    contexts: torch.Tensor
    starts: torch.Tensor

    @classmethod
    def of(cls, contexts: Sequence[int], lengths: Sequence[Sequence[int]]) -> "Branches":
        """Rows with ``contexts[b]`` context tokens and branches of ``lengths[b]`` tokens each (0 is allowed)."""
        if len(contexts) != len(lengths) or any(context < 1 for context in contexts):
            raise DataError(f"contexts={list(contexts)} need one token or more and one list of branches each.")
        total = max(context + sum(own) for context, own in zip(contexts, lengths))
        starts = torch.zeros(len(contexts), total, dtype=torch.long)
        for row, (context, own) in enumerate(zip(contexts, lengths)):
            column = context
            for length in own:
                starts[row, column : column + length] = column
                column += length
            # Pads on the right: branches of one token, which nobody reads and which read no block beyond the context.
            starts[row, column:] = torch.arange(column, total)
        return cls(contexts=torch.tensor(list(contexts)), starts=starts)

    @property
    def positions(self) -> torch.Tensor:
        """int64 [B, T]: what the model must take for position_ids."""
        columns = torch.arange(self.starts.shape[1])
        return torch.where(self.starts > 0, self.contexts.unsqueeze(1) + columns - self.starts, columns)

    @property
    def fork(self) -> int:
        """Columns before this one are context in every row."""
        return int(self.contexts.min())

    def columns(self, bounds: torch.Tensor) -> torch.Tensor:
        """Bounds [B or 1, T], by position and counted in positions, as bounds [B, T] by column, counted in columns.

        A bound inside a branch moves to that branch's columns; the neighbours that lie before it are hidden anyway.
        """
        found = bounds.expand(len(self.contexts), -1).gather(1, self.positions)
        context = self.contexts.unsqueeze(1)
        return torch.where(found > context, self.starts.clamp(min=context) + found - context, found)

    def hide(self, scores: torch.Tensor, start: int, first: int) -> None:
        """Hide the neighbours from queries at ``start``: scores [B, K, G, L, columns from ``first``], in place."""
        stop = start + scores.shape[-2]
        if stop <= self.fork:
            return
        hidden = self._neighbours(start, stop, first + scores.shape[-1])[..., first:]
        scores.masked_fill_(hidden[:, None, None].to(scores.device), torch.finfo(scores.dtype).min)

    def mask(self) -> torch.Tensor:
        """bool [B, 1, T - fork, T]: what the queries from the fork on see, causality included."""
        total = self.starts.shape[1]
        past = torch.arange(total) <= torch.arange(self.fork, total).unsqueeze(1)
        return (past & ~self._neighbours(self.fork, total, total)).unsqueeze(1)

    def _neighbours(self, start: int, stop: int, columns: int) -> torch.Tensor:
        """bool [B, stop - start, columns]: columns of earlier branches, for the queries of [start, stop)."""
        column = torch.arange(columns)
        own = self.starts[:, start:stop].unsqueeze(-1)
        return (column >= self.contexts.view(-1, 1, 1)) & (column < own)
