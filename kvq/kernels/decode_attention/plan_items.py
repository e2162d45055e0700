"""Cut the work of a decode launch on the device (the rule of ``kvq.kernels.decode_attention.decode_plan``)."""

import torch
import triton
import triton.language as tl

from kvq.kernels.device.launch import Launch
from kvq.kernels.geometry import MAX_SPLITS, OVERHEAD, Tile

_ITEMS = 32


@triton.jit(do_not_specialize=["batch", "slots", "capacity", "programs", "window", "first_token"])
def plan_items(
    lengths,
    positions,
    items,
    spans,
    batch,
    slots,
    capacity,
    programs,
    window,
    first_token,
    ROUND: tl.constexpr,
    QUERIES: tl.constexpr,
    OVERHEAD: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BATCH: tl.constexpr,
    ITEMS: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Grid (blocks of ITEMS items). Every program repeats the choice, so none waits for another.

    lengths, positions [batch] int32; items [capacity, 4] and spans [batch, 2] int32 are written. programs: those of one
    item, over KV heads and column blocks.
    """
    b = tl.arange(0, BATCH)
    exists = b < batch
    length = tl.load(lengths + b, mask=exists, other=0)
    first = tl.zeros_like(length)
    if WINDOW:
        position = tl.load(positions + b, mask=exists, other=0) - first_token
        first = tl.maximum(position + 1 - window, 0) // ROUND
    rounds = tl.maximum(tl.cdiv(length, ROUND) - first, 0)
    longest = tl.max(rounds, 0)
    best = tl.maximum(longest, 1)
    best_cost = (1 << 31) - 1
    for splits in range(1, MAX_SPLITS + 1):
        run = tl.maximum(tl.cdiv(longest, splits), 1)
        total = tl.sum(tl.cdiv(rounds, run), 0)
        cost = tl.cdiv(total * programs, slots) * (run + OVERHEAD)
        better = (total <= capacity) & (cost < best_cost)
        best = tl.where(better, run, best)
        best_cost = tl.where(better, cost, best_cost)
    count = tl.cdiv(rounds, best)
    end = tl.cumsum(count, 0)
    start = end - count
    if tl.program_id(0) == 0:
        tl.store(spans + b * 2, start, mask=exists)
        tl.store(spans + b * 2 + 1, count, mask=exists)
    item = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
    # The sequence of an item is the number of sequences that end before it.
    sequence = tl.sum((end[None, :] <= item[:, None]).to(tl.int32) * exists[None, :].to(tl.int32), 1)
    own = (b[None, :] == sequence[:, None]).to(tl.int32)
    at = (item - tl.sum(own * start[None, :], 1)) * best
    size = tl.minimum(tl.sum(own * rounds[None, :], 1) - at, best)
    used = sequence < batch
    to = items + item * 4
    tl.store(to, tl.where(used, sequence, -1), mask=item < capacity)
    tl.store(to + 1, tl.where(used, tl.sum(own * first[None, :], 1) + at, 0), mask=item < capacity)
    tl.store(to + 2, tl.where(used, size, 0), mask=item < capacity)
    tl.store(to + 3, tl.zeros_like(item), mask=item < capacity)


def plan_launch(
    lengths: torch.Tensor,
    positions: torch.Tensor | None,
    items: torch.Tensor,
    spans: torch.Tensor,
    *,
    slots: int,
    programs: int,
    tile: Tile,
    queries: int,
    window: int | None,
    first_token: int,
) -> Launch:
    """Tensors and ``programs`` as for the kernel; slots: programs that run at once."""
    batch, capacity = len(spans), len(items)
    return Launch(
        kernel=plan_items,
        grid=(-(-capacity // _ITEMS), 1, 1),
        args=(
            lengths,
            lengths if positions is None else positions,
            items,
            spans,
            batch,
            slots,
            capacity,
            programs,
            window or 0,
            first_token,
        ),
        constants={
            "ROUND": tile.round,
            "QUERIES": queries,
            "OVERHEAD": OVERHEAD,
            "MAX_SPLITS": MAX_SPLITS,
            "BATCH": 1 << (batch - 1).bit_length(),
            "ITEMS": _ITEMS,
            "WINDOW": window is not None,
        },
        options={"num_warps": 4},
    )
