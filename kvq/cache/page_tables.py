"""Which pages every row of a store has: tables over a pool, which rows that were copied share."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import zip_longest

import torch

from kvq.pages.pool import Pool


class PageTables:
    """``rows``: by row, its page ids in order. Rows share closed pages alone: those that nobody writes to any more."""

    def __init__(self, pool: Pool, rows: int):
        self.pool = pool
        self.rows: list[list[int]] = [[] for _ in range(rows)]
        self._numbers: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getstate__(self) -> dict:
        # A copy's pages lie elsewhere.
        return self.__dict__ | {"_numbers": None}

    def forget_numbers(self) -> None:
        """Pages have moved, or others than these tables have changed."""
        self._numbers = None

    @property
    def numbers(self) -> torch.Tensor:
        """As kernels on the device read them (``Pool.table``); made anew when they change."""
        if self._numbers is None:
            self._numbers = self.pool.table(self.rows)
        return self._numbers

    def grow(self, rows: Sequence[int], pages: int) -> None:
        """Take pages until these rows have ``pages`` of them."""
        missing = [row for row in rows if len(self.rows[row]) < pages]
        if not missing:
            return
        self._numbers = None
        have = len(self.rows[missing[0]])
        if all(len(self.rows[row]) == have for row in missing):
            ids = self.pool.allocate((pages - have) * len(missing))
            # Page-major, so that a batch that grows together reads its pages as one view.
            for i, row in enumerate(missing):
                self.rows[row] += ids[i :: len(missing)]
            return
        for row in missing:
            self.rows[row] += self.pool.allocate(pages - len(self.rows[row]))

    def select(self, order: Sequence[int]) -> None:
        """Take rows by index. Whoever goes on to write calls ``own_from`` before."""
        old, self._numbers = self.rows, None
        self.rows = [old[b] if b == row else list(old[b]) for row, b in enumerate(order)]
        gained, lost = [], []
        for before, after in zip_longest(old, self.rows, fillvalue=[]):
            same = _same(before, after)
            gained += after[same:]
            lost += before[same:]
        self.pool.share(gained)
        # Pages that no chosen row reads go before copies are made, so that these can take their place.
        self.pool.release(lost)

    def own_from(self, rows: Iterable[int], closed: Sequence[int]) -> None:
        """Give rows copies of the pages that others read too, from the first that is not closed (``closed`` by row)."""
        for row in rows if self.pool.owned else ():
            table = self.rows[row]
            for p in range(closed[row], len(table)):
                if self.pool.readers[table[p]] > 1:
                    table[p], self._numbers = self.pool.copy_page(table[p]), None


def _same(before: list[int], after: list[int]) -> int:
    """How many first pages of two tables are the same: rows share closed pages alone, so none is after the first that
    differs."""
    return bisect_left(range(min(len(before), len(after))), True, key=lambda p: before[p] != after[p])
