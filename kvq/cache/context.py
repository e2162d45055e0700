"""What a forward knows that no layer does, asked once for all packed layers of a cache."""

from dataclasses import dataclass

import torch

from kvq.cache.fused import Steps


@dataclass(frozen=True, kw_only=True)
class NewTokens:
    """The running forward's columns: ``valid`` [B, L] on the CPU, which are real tokens, and ``counts`` of them by row.

    ``valid`` is None, and so is ``counts``, if all are real.
    """

    valid: torch.Tensor | None = None
    counts: tuple[int, ...] | None = None


ALL_REAL = NewTokens()


class ForwardContext:
    """Shared by a cache's packed layers; ``begin`` is called before a forward, by the hook on the model.

    impl       what attends and packs, see ``kvq.kernels.choice``.
    prompt     columns up to the end of this turn's prompt, if ``generate`` told; a draft may come with it.
    positions  [B or 1, L], rotary positions of the running forward's tokens, if the forward told.
    steps      what the kernel launches of a forward share; counters: of its stores while the device counts.
    """

    def __init__(self, impl: str = "auto"):
        self.impl = impl
        self.prompt: int | None = None
        self.positions: torch.Tensor | None = None
        # A forward failed in a way that left layers with different tokens.
        self.is_broken = False
        self.steps = Steps()
        self.counters: dict = {}
        self._mask: torch.Tensor | None = None
        self._forward = 0
        self._forget()

    def begin(self, mask: torch.Tensor | None, positions: torch.Tensor | None = None) -> None:
        """A forward starts. ``mask`` [B, T]: which of all columns are real tokens; None if all are."""
        self._mask, self.positions = mask, positions
        self._forward += 1
        self._forget()

    def _forget(self) -> None:
        self._new: tuple[tuple[int, int], NewTokens] | None = None
        self._joined: tuple[torch.Tensor | None, int, torch.Tensor] | None = None
        self._plain: tuple[torch.Tensor, tuple, bool] | None = None

    def new_tokens(self, start: int, length: int) -> NewTokens:
        """Which of the columns [start, start + length) are real: the only wait for the device, one a forward."""
        if self._mask is None or self._mask.shape[1] < start + length:
            return ALL_REAL
        if self._new is None or self._new[0] != (start, length):
            part = self._mask[:, start : start + length].cpu()
            found = ALL_REAL
            if not bool(part.all()):
                found = NewTokens(valid=part, counts=tuple(part.sum(1).tolist()))
            self._new = (start, length), found
        return self._new[1]

    def real(self, before: torch.Tensor | None, start: int, rows: int, length: int) -> torch.Tensor | None:
        """All columns' [B, start + length], on the CPU: those ``before`` and the new ones; None while all are real."""
        valid = self.new_tokens(start, length).valid
        if valid is None and before is None:
            return None
        # Layers that hold one tensor get one tensor.
        if self._joined is None or self._joined[0] is not before or self._joined[1] != length:
            held = torch.ones(rows, start, dtype=torch.bool) if before is None else before
            fresh = torch.ones(rows, length, dtype=torch.bool) if valid is None else valid
            self._joined = before, length, torch.cat([held, fresh], dim=1)
        return self._joined[2]

    def is_plain(self, mask: torch.Tensor, real: torch.Tensor | None, total: int) -> bool:
        """Whether a mask [B or 1, 1, L, T] of real queries hides pads and what comes after a query, and nothing else.

        ``real`` [B, total] or None; what the mask says beyond ``total`` columns does not matter. Asked of the device
        once a forward.
        """
        if mask.shape[-1] < total:
            return False
        # An inference tensor does not tell whether it was written to; within a forward nobody writes to a mask.
        state = (mask.shape, total, self._forward if mask.is_inference() else mask._version)
        is_known = self._plain is not None and self._plain[0] is mask and self._plain[1] == state
        if not is_known or (mask.is_inference() and not self._forward):
            self._plain = mask, state, _is_plain(mask[:, 0, :, :total], real)
        return self._plain[2]


def _is_plain(mask: torch.Tensor, real: torch.Tensor | None) -> bool:
    """mask [B or 1, L, T]."""
    length, total = mask.shape[1:]
    position = torch.arange(total - length, total, device=mask.device)
    expected = torch.arange(total, device=mask.device) <= position.unsqueeze(1)
    if mask.dtype == torch.bool:
        right = mask == expected
    else:
        hidden = mask <= torch.finfo(mask.dtype).min / 2
        right = ((mask == 0) == expected) & (hidden == ~expected)
    # Whatever is said of pads, they are not there.
    return bool((right if real is None else right | ~real.to(mask.device).unsqueeze(1)).all())
