"""Rotary positions of stored tokens, kept as runs: nearly always one run a row, whatever the length."""

from collections.abc import Sequence

import torch


class Positions:
    """Positions of every row's stored tokens, for keys that are stored in a frame.

    A row is a list of runs (index of the first token, its position); positions go up by one within a run. So left pads,
    packed sequences and gaps are exact, and a row without any costs one pair.
    """

    def __init__(self, rows: int):
        self.runs: list[list[tuple[int, int]]] = [[] for _ in range(rows)]
        self.counts = [0] * rows

    def extend(self, positions: torch.Tensor, valid: torch.Tensor | None) -> None:
        """Append positions [B or 1, L]; ``valid`` [B, L] marks tokens that exist (None: all)."""
        if positions.shape[1] == 1 and valid is None:
            for row, own in enumerate(positions.expand(len(self.runs), -1)[:, 0].tolist()):
                self._extend(row, self.counts[row], own)
                self.counts[row] += 1
            return
        positions = positions.expand(len(self.runs), -1).cpu()
        for row in range(len(self.runs)):
            own = positions[row] if valid is None else positions[row][valid[row].cpu()]
            if not len(own):
                continue
            breaks = (own.diff() != 1).nonzero().squeeze(1) + 1
            for start in [0, *breaks.tolist()]:
                self._extend(row, self.counts[row] + start, int(own[start]))
            self.counts[row] += len(own)

    def _extend(self, row: int, index: int, position: int) -> None:
        """A run of a row from token ``index`` on, unless it goes on with the last one."""
        runs = self.runs[row]
        if not runs or position - runs[-1][1] != index - runs[-1][0]:
            runs.append((index, position))

    def of_rows(self, rows: Sequence[int]) -> list[list[tuple[int, int]]]:
        """The runs of some rows."""
        return [self.runs[row] for row in rows]

    def of(self, rows: list[int], start: int, stop: int, step: int = 1) -> torch.Tensor:
        """Positions of every ``step``-th token of [start, stop) of some rows, int64 [len(rows), tokens]."""
        tokens = torch.arange(start, stop, step)
        found = torch.empty(len(rows), len(tokens), dtype=torch.long)
        for i, row in enumerate(rows):
            for j, (index, position) in enumerate(self.runs[row]):
                end = self.runs[row][j + 1][0] if j + 1 < len(self.runs[row]) else stop
                own = slice(*(max(0, -(-(bound - start) // step)) for bound in (index, end)))
                found[i, own] = tokens[own] - index + position
        return found

    def crop(self, counts: list[int]) -> None:
        """Forget the newest ``counts[b]`` tokens of every row."""
        self.counts = [max(0, held - count) for held, count in zip(self.counts, counts, strict=True)]
        self.runs = [[run for run in runs if run[0] < held] for runs, held in zip(self.runs, self.counts)]

    def select(self, order: list[int]) -> None:
        """Take rows by index."""
        self.runs = [list(self.runs[i]) for i in order]
        self.counts = [self.counts[i] for i in order]
