"""Rotations of queries to the origins of blocks, for kernels that read keys in a frame: made once for all layers."""

from collections.abc import Callable, Sequence

import torch

from kvq.kernels.cpp.launch import FrameNumbers
from kvq.kernels.types import KeyFrame
from kvq.transforms.frame import Frame

_CPU = torch.device("cpu")


def packed_origins(store, rows: list[int], packed: Sequence[int]) -> torch.Tensor:
    """Origins [rows, blocks] of the first ``packed`` keys of a store's rows; 0 where a row has fewer blocks."""
    if len(set(packed)) == 1 and packed[0]:
        return store.origins(rows, 0, packed[0])
    own = [store.origins([row], 0, n)[0] if n else torch.zeros(0, dtype=torch.long) for row, n in zip(rows, packed)]
    return torch.nn.utils.rnn.pad_sequence(own, batch_first=True)


def place_of(store, rows: Sequence[int], packed: Sequence[int]) -> tuple | None:
    """All that origins follow from, in layers that store alike; None where tokens were dropped."""
    return None if store.kept is not None else (store.group.sinks, *packed, *map(tuple, store.positions.of_rows(rows)))


class Turns:
    """Cosines and sines by origin, kept from step to step: blocks that have come since are added."""

    def __init__(self):
        self._held: dict[tuple, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        # What was asked last, and the answer: layers of a forward ask alike.
        self._last: tuple[tuple, tuple[torch.Tensor, torch.Tensor]] | None = None
        self._placed: dict[tuple, _Placed] = {}

    def _once(self, asked: tuple, place: tuple | None, made: Callable[[], tuple]) -> tuple[torch.Tensor, torch.Tensor]:
        if place is None:
            return made()
        key = *asked, *place
        if self._last is None or self._last[0] != key:
            self._last = key, made()
        return self._last[1]

    def of(
        self, frame: Frame, origins: Callable[[], torch.Tensor], place: tuple | None, queries: int, dtype: torch.dtype
    ) -> FrameNumbers:
        """For ``origins()`` [B, N] of a frame's blocks and so many queries of a KV head, on the CPU.

        ``place``: equal where origins are; None if nobody knows.
        """
        key = frame.rope, frame.head_dim, frame.block, dtype
        cos, sin = self._once(key, place, lambda: self._turns(key, frame, origins(), dtype))
        # A block that is shorter than there are queries turns its keys.
        turns_keys = frame.block < queries
        matrix, mean = frame.reader(_CPU, dtype, of_keys=turns_keys)
        return FrameNumbers(
            block=frame.block,
            turns_keys=turns_keys,
            cos=cos,
            sin=sin,
            partner=frame.partner,
            matrix=matrix,
            mean=mean,
        )

    def _turns(
        self, key: tuple, frame: Frame, origins: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        held, cos, sin = self._held.get(key, (origins[:, :0], None, None))
        known = held.shape[1]
        if known > origins.shape[1] or len(held) != len(origins) or not torch.equal(held, origins[:, :known]):
            known = 0
        if known == origins.shape[1] and cos is not None:
            return cos, sin
        fresh = [part.contiguous() for part in frame.turns(origins[:, known:], dtype)]
        if known:
            fresh = [torch.cat([old, new], dim=1) for old, new in zip((cos, sin), fresh)]
        self._held[key] = (origins, *fresh)
        return self._held[key][1:]

    def on_device(
        self, frame: Frame, origins: Callable[[], torch.Tensor], place: tuple | None, device: torch.device
    ) -> KeyFrame:
        """The same as the Triton kernels read it, of origins that the host knows. Only what has come since is computed
        and copied."""
        key = frame.rope, frame.head_dim, frame.block, device
        placed = self._placed.setdefault(key, _Placed(device))
        return frame.key_frame(*self._once(key, place, lambda: placed.of(frame, origins())))


class _Placed:
    """Turns on a device: one row for every origin, which sequences share, and by sequence and block its row."""

    def __init__(self, device: torch.device):
        self.device = device
        self.rows: dict[int, int] = {}
        self.origins: torch.Tensor | None = None
        self.index = self.turns = torch.empty(0)

    def of(self, frame: Frame, origins: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(index [B, N] int32, turns [origins, 2, D] fp32)."""
        if self.origins is not None and torch.equal(self.origins, origins):
            return self.index, self.turns
        fresh = [origin for origin in origins.unique().tolist() if origin not in self.rows]
        if fresh:
            made = torch.stack(frame.turns(torch.tensor(fresh)), dim=1).to(self.device)
            self.turns = torch.cat([self.turns, made]) if self.rows else made
            self.rows |= {origin: len(self.rows) + i for i, origin in enumerate(fresh)}
        numbers = [[self.rows[origin] for origin in row] for row in origins.tolist()]
        self.index = torch.tensor(numbers, dtype=torch.int32).view(origins.shape).to(self.device, non_blocking=True)
        self.origins = origins
        return self.index, self.turns
