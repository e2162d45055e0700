"""Which of the tokens that a row has seen it still stores, where somebody drops tokens."""

import numpy as np


class Kept:
    """One bit a token, by row, up to the last one that was dropped; whatever comes after it is stored.

    dropped   by row, tokens that were seen and are not stored.
    """

    def __init__(self, rows: int):
        self.dropped = [0] * rows
        self._bits = [np.zeros(0, np.uint8)] * rows
        # Tokens that the bits speak of.
        self._lengths = [0] * rows

    def _mask(self, row: int) -> np.ndarray:
        return np.unpackbits(self._bits[row], count=self._lengths[row]).astype(bool)

    def drop(self, row: int, seen: np.ndarray) -> None:
        """Forget tokens of a row for good; ``seen``: their numbers, each stored till now, in ascending order."""
        if not len(seen):
            return
        mask = np.ones(max(self._lengths[row], int(seen[-1]) + 1), bool)
        mask[: self._lengths[row]] = self._mask(row)
        mask[seen] = False
        self.dropped[row] += len(seen)
        self._bits[row], self._lengths[row] = np.packbits(mask), len(mask)

    def stored(self, row: int, seen: int) -> int:
        """How many of the first ``seen`` tokens are stored."""
        if seen >= self._lengths[row]:
            return seen - self.dropped[row]
        return int(self._mask(row)[:seen].sum())

    def dropped_after(self, row: int, seen: int) -> bool:
        """Whether a token after the first ``seen`` was dropped."""
        return seen - self.stored(row, seen) < self.dropped[row]

    def seen(self, row: int, start: int, stop: int) -> np.ndarray:
        """The stored tokens [start, stop) of a row by their numbers among those that it has seen, int64."""
        held = np.flatnonzero(self._mask(row))
        later = np.arange(len(held), max(stop, len(held))) + self.dropped[row]
        return np.concatenate([held, later])[start:stop]

    def select(self, order: list[int]) -> None:
        """Take rows by index."""
        self.dropped = [self.dropped[row] for row in order]
        self._bits = [self._bits[row] for row in order]
        self._lengths = [self._lengths[row] for row in order]

    @property
    def nbytes(self) -> int:
        return sum(bits.nbytes for bits in self._bits)
