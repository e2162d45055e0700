"""Rotations of queries to the origins of blocks, for kernels that read keys in a frame: made once for all layers."""

from collections.abc import Callable

import torch

from kvq.kernels.cpp.launch import FrameNumbers
from kvq.transforms.frame import Frame

_CPU = torch.device("cpu")


class Turns:
    """Cosines and sines by origin, kept from step to step: blocks that have come since are added."""

    def __init__(self):
        self._held: dict[tuple, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        # What was asked last, and the answer: layers of a forward ask alike.
        self._last: tuple[tuple | None, tuple[torch.Tensor, torch.Tensor]] | None = None

    def of(
        self, frame: Frame, origins: Callable[[], torch.Tensor], place: tuple | None, queries: int, dtype: torch.dtype
    ) -> FrameNumbers:
        """For ``origins()`` [B, N] of a frame's blocks and so many queries of a KV head, on the CPU.

        ``place``: equal where origins are; None if nobody knows.
        """
        asked = None if place is None else (frame.rope, frame.head_dim, frame.block, dtype, *place)
        if asked is None or self._last is None or self._last[0] != asked:
            self._last = asked, self._turns(frame, origins(), dtype)
        cos, sin = self._last[1]
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

    def _turns(self, frame: Frame, origins: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        key = frame.rope, frame.head_dim, frame.block, dtype
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
