"""The counters of a step, moved on the device."""

import torch
import triton
import triton.language as tl

from kvq.kernels.device.launch import Launch
from kvq.pages.flush import FlushRule

# Counters of a sequence, see ``kvq.kernels.append.decode_state.DecodeState``.
COUNTERS = tl.constexpr(8)
_BLOCK = 32


@triton.jit
def _packed(stored, window, unit, sinks):
    """Tokens after the sinks that are packed once ``stored`` tokens are in the cache."""
    body = tl.maximum(stored - sinks, 0)
    return tl.where(unit > 1, body // unit * unit, tl.maximum(body - window, 0))


@triton.jit(do_not_specialize=["batch", "new", "sinks", "key_window", "key_unit", "value_window", "value_unit"])
def advance(
    counters,
    exact_lengths,
    lengths,
    positions,
    new_tokens,
    batch,
    new,
    sinks,
    key_window,
    key_unit,
    value_window,
    value_unit,
    PER_SEQUENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (blocks of BLOCK sequences): move every sequence on by ``new`` tokens (or ``new_tokens[b]``).

    counters [B, 8] int32 in and out: tokens stored before this step and in it, flush ranges of keys and of values.
    exact_lengths [B, 4], lengths [B], positions [B] int32 out, as attention takes them.
    """
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = b < batch
    own = counters + b * COUNTERS
    before = tl.load(own + 1, mask=real, other=0)
    added = tl.load(new_tokens + b, mask=real, other=0) if PER_SEQUENCE else tl.zeros_like(before) + new
    total = before + added
    key_done = tl.load(own + 3, mask=real, other=0)
    value_done = tl.load(own + 5, mask=real, other=0)
    key_end = tl.maximum(_packed(before, key_window, key_unit, sinks), key_done)
    value_end = tl.maximum(_packed(before, value_window, value_unit, sinks), value_done)
    tl.store(own, before, mask=real)
    tl.store(own + 1, total, mask=real)
    tl.store(own + 2, key_done, mask=real)
    tl.store(own + 3, key_end, mask=real)
    tl.store(own + 4, value_done, mask=real)
    tl.store(own + 5, value_end, mask=real)
    low = tl.minimum(key_end, value_end)
    tl.store(exact_lengths + b * 4, low, mask=real)
    tl.store(exact_lengths + b * 4 + 1, key_end, mask=real)
    tl.store(exact_lengths + b * 4 + 2, value_end, mask=real)
    tl.store(exact_lengths + b * 4 + 3, tl.maximum(total - sinks, 0), mask=real)
    tl.store(lengths + b, low, mask=real)
    tl.store(positions + b, before, mask=real)


def advance_launch(
    state: dict[str, torch.Tensor], new: int | torch.Tensor, sinks: int, key: FlushRule, value: FlushRule
) -> Launch:
    """``state``: counters, exact_lengths, lengths, positions and zeros of a ``DecodeState``."""
    per_sequence = isinstance(new, torch.Tensor)
    batch = len(state["lengths"])
    return Launch(
        kernel=advance,
        grid=(-(-batch // _BLOCK), 1, 1),
        args=(
            state["counters"],
            state["exact_lengths"],
            state["lengths"],
            state["positions"],
            new if per_sequence else state["zeros"],
            batch,
            0 if per_sequence else new,
            sinks,
            key.window,
            key.unit,
            value.window,
            value.unit,
        ),
        constants={"PER_SEQUENCE": per_sequence, "BLOCK": _BLOCK},
        options={"num_warps": 1},
    )
