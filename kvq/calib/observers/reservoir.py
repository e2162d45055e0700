"""A bounded, seeded set of whole windows of queries, keys and values of one layer.

For what cannot be computed from sums: learned transforms, and searches whose objective is the attention output.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from kvq.calib.observers.base import Statistic
from kvq.errors import DataError

TENSORS = ("query", "key", "value")


@dataclass(frozen=True, kw_only=True)
class Reservoir(Statistic):
    """Windows one after another along the tokens, by ascending priority; each starts at its text's first token.

    query      [N, H, D] after RoPE: all query heads; H / K neighbouring ones read one KV head.
    key, value [N, K, D] after RoPE, as cached. All three in the model's dtype; float64 is kept as float32.
    lengths    int64 [W]: tokens of each window, with sum N.
    priority   int64 [W]: ``window_priorities``; the lowest are kept.
    scaling    what attention multiplies q . k with.
    capacity   bytes of the three tensors at most.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    lengths: torch.Tensor
    priority: torch.Tensor
    scaling: float
    capacity: int

    @classmethod
    def observe(
        cls,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        valid: torch.Tensor | None,
        *,
        rows: Sequence[int],
        priority: torch.Tensor,
        scaling: float,
        capacity: int,
    ) -> "Reservoir":
        """Keep the windows ``rows`` of query [B, H, T, D], key and value [B, K, T, D]; valid as elsewhere [B, T]."""
        order = sorted(rows, key=lambda row: int(priority[row]))
        kept = {name: [x.new_zeros(0, x.shape[1], x.shape[3])] for name, x in zip(TENSORS, (query, key, value))}
        for row in order:
            for name, x in zip(TENSORS, (query, key, value)):
                tokens = x[row].transpose(0, 1)
                kept[name].append(tokens if valid is None else tokens[valid[row]])
        dtype = torch.float32 if query.dtype == torch.float64 else query.dtype
        return cls(
            **{name: torch.cat(parts).to(dtype) for name, parts in kept.items()},
            lengths=torch.tensor([len(part) for part in kept["key"][1:]], dtype=torch.int64),
            priority=priority[order].cpu(),
            scaling=scaling,
            capacity=capacity,
        )

    def windows(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(query [H, T, D], key [K, T, D], value [K, T, D]) of each window."""
        parts = [getattr(self, name).split(self.lengths.tolist()) for name in TENSORS]
        for window in zip(*parts):
            yield tuple(x.transpose(0, 1) for x in window)

    def merge(self, other: "Reservoir") -> "Reservoir":
        """The windows of lowest priority number of both, as many as fit; a window that both hold counts once."""
        if self.capacity != other.capacity or self.scaling != other.scaling:
            raise DataError("reservoirs of different capacity or attention scaling cannot be joined: calibrate again.")
        found: dict[int, tuple[torch.Tensor, ...]] = {}
        for reservoir in (self, other):
            for priority, window in zip(reservoir.priority.tolist(), reservoir.windows()):
                found.setdefault(priority, window)
        kept, room = [], self.capacity
        for priority in sorted(found):
            room -= sum(x.nbytes for x in found[priority])
            if room < 0:
                break
            kept.append(priority)
        joined = {
            name: torch.cat([getattr(self, name)[:0]] + [found[p][i].transpose(0, 1) for p in kept])
            for i, name in enumerate(TENSORS)
        }
        lengths = [found[priority][1].shape[1] for priority in kept]
        return Reservoir(
            **joined,
            lengths=torch.tensor(lengths, dtype=torch.int64),
            priority=torch.tensor(kept, dtype=torch.int64),
            scaling=self.scaling,
            capacity=self.capacity,
        )


def choose_windows(priority: torch.Tensor, window_bytes: Sequence[int], capacity: int) -> torch.Tensor:
    """Which windows a reservoir of so many bytes will hold in the end, bool [W]: what ``merge`` would leave.

    Known before the run, so that no other window is ever copied.
    """
    chosen = torch.zeros(len(priority), dtype=torch.bool)
    room = capacity
    for index in priority.argsort(stable=True).tolist():
        room -= window_bytes[index]
        if room < 0:
            break
        chosen[index] = True
    return chosen
