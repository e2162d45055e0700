"""The exact recent window of one side, right-aligned so that rows of different length share one buffer."""

import torch

# Free room at the end of a fresh buffer, in tokens: the window is moved or regrown once every HEADROOM steps.
HEADROOM = 16


class Tail:
    """The last tokens of every row, ``[B, kv_heads, capacity, head_dim]``.

    Row b owns the ``lengths[b]`` tokens that end at the buffer's fill mark; rows fill at the same pace.
    """

    def __init__(self, rows: int):
        self.buffer: torch.Tensor | None = None
        # A first prompt is borrowed from the caller until what stays of it is copied; it is never written to.
        self.borrowed = False
        self.end = 0
        self.lengths = [0] * rows

    @classmethod
    def of(cls, exact: torch.Tensor, lengths: list[int]) -> "Tail":
        """The last ``lengths[b]`` tokens of every row of right-aligned ``exact`` [B, kv_heads, any, head_dim]."""
        tail = cls(len(lengths))
        tail.buffer, tail.end, tail.lengths = exact, exact.shape[2], list(lengths)
        return tail

    def newest(self) -> torch.Tensor:
        """The tokens of all rows, right-aligned [B, kv_heads, longest, head_dim]; there must have been some."""
        return self._last(self.longest)

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    def extend(self, x: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
        """Append x [B, kv_heads, L, head_dim]; ``valid`` [B, L] marks tokens that exist (None: all).

        Returns tail and new tokens, right-aligned, [B, kv_heads, longest, head_dim]; valid until the next call.
        """
        new = x.shape[-2]
        counts = [new] * len(self.lengths) if valid is None else valid.sum(1).tolist()
        old = self.longest
        if valid is None and self.buffer is not None and old:
            joined = self._append(x, old)
        else:
            self.borrowed = not old
            joined = x if self.borrowed else torch.cat([self._last(old), x], dim=2)
            if valid is not None:
                joined = _right_align(joined, torch.cat([self._held(old), valid.cpu()], dim=1))
            self.buffer, self.end = joined, joined.shape[2]
        self.lengths = [length + count for length, count in zip(self.lengths, counts)]
        return self._last(self.longest)

    def _append(self, x: torch.Tensor, old: int) -> torch.Tensor:
        new = x.shape[2]
        if self.borrowed or self.end + new > self.buffer.shape[2]:
            keep = self._last(old)
            if self.borrowed or old + new + HEADROOM > self.buffer.shape[2]:
                shape = (*x.shape[:2], old + new + HEADROOM, x.shape[3])
                self.buffer, self.borrowed = x.new_empty(shape), False
            else:
                keep = keep.clone()
            self.buffer[:, :, :old] = keep
            self.end = old
        self.buffer.narrow(2, self.end, new).copy_(x)
        self.end += new
        return self.buffer

    def _last(self, count: int) -> torch.Tensor:
        return self.buffer.narrow(2, self.end - count, count)

    def keep(self, lengths: list[int]) -> None:
        """Shorten every row to its last ``lengths[b]`` tokens; the buffer follows, within two HEADROOMs."""
        self.lengths = lengths
        if self.buffer is None:
            return
        if self.borrowed or self.buffer.shape[2] > self.longest + 2 * HEADROOM:
            self.borrowed = False
            kept = self._last(self.longest)
            self.buffer = kept.new_empty(*kept.shape[:2], self.longest + HEADROOM, kept.shape[3])
            self.buffer[:, :, : self.longest] = kept
            self.end = self.longest

    def _held(self, count: int) -> torch.Tensor:
        """Which of the last ``count`` tokens of the buffer are a row's own, [B, count]."""
        return torch.arange(count) >= count - torch.tensor(self.lengths).unsqueeze(1)

    def choose(self, chosen: torch.Tensor) -> None:
        """Keep the marked ones of every row's tokens, in order; ``chosen`` [B, longest], right-aligned as they are."""
        real = self._held(self.longest) & chosen
        # A new buffer, or one that still is somebody else's: ``keep`` copies what stays.
        self.buffer, self.borrowed = _right_align(self.newest(), real), True
        self.lengths, self.end = real.sum(1).tolist(), real.shape[1]

    def crop(self, counts: list[int]) -> None:
        """Forget the newest ``counts[b]`` tokens of every row."""
        if len(set(counts)) == 1:
            self.end = max(0, self.end - counts[0])
            self.lengths = [max(0, length - counts[0]) for length in self.lengths]
        elif self.longest:
            newest = torch.arange(self.longest) >= self.longest - torch.tensor(counts).unsqueeze(1)
            self.choose(~newest)

    def last(self, rows: list[int], count: int) -> torch.Tensor:
        """The last ``count`` tokens of some rows, [len(rows), kv_heads, count, head_dim]."""
        tail = self._last(count)
        return tail if len(rows) == tail.shape[0] else tail[rows]

    def select(self, index: torch.Tensor) -> None:
        """Take rows by index, for beams and batch changes."""
        order = index.tolist()
        self.lengths = [self.lengths[i] for i in order]
        if self.buffer is not None:
            self.buffer = self.buffer.index_select(0, index.to(self.buffer.device))

    @property
    def nbytes(self) -> int:
        return 0 if self.buffer is None else self.buffer.nbytes

    def to(self, device: torch.device) -> None:
        if self.buffer is not None:
            self.buffer = self.buffer.to(device)


def _right_align(joined: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Move every row's tokens that ``real`` [B, tokens] marks to the right end; what precedes them is undefined."""
    # A stable sort puts the unreal tokens first and keeps the order of the others.
    order = torch.argsort(real.to(torch.int8), dim=1, stable=True)
    if torch.equal(order, torch.arange(order.shape[1]).expand_as(order)):
        return joined
    order = order.to(joined.device)[:, None, :, None].expand_as(joined)
    return joined.gather(2, order)
