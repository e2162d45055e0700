"""A token for each of several rows that are alike, on the CPU: what ``HeadStore.append`` does, without what only other
updates need. The Python around a layer of a small model takes as long as its attention."""

import torch

from kvq.cache.snapshot import TokenSnapshot, View
from kvq.pages.layout import SIDES


def serves(store, dtype: torch.dtype) -> bool:
    """Whether ``append`` may take the next token of every row."""
    if store.kept is not None or store.holding or store.recording or store.split > 1 or store.step is not None:
        return False
    held = (store.seen, *store.packed.values(), *(tail.lengths for tail in store.tails.values()))
    alike = len(store.seen) == 1 or all(own.count(own[0]) == len(own) for own in held)
    return alike and store.seen[0] >= max(store.group.sinks, 1) and store.serving(dtype).no_cpp is None


def append(store, new: dict[str, torch.Tensor], positions: torch.Tensor | None) -> TokenSnapshot:
    """Store {side: [B, kv_heads, 1, head_dim]} and pack what the rules say, as ``HeadStore.append``."""
    rows, before, sinks = len(store.seen), store.seen[0], store.group.sinks
    everyone, body = list(range(rows)), before + 1 - sinks
    if store.positions is not None:
        store.positions.extend(torch.full((1, 1), before) if positions is None else positions, None)
    store.seen, store.stored = [before + 1] * rows, [before + 1] * rows
    exact, read, offsets = {}, {}, []
    for side in SIDES:
        tail, rule = store.tails[side], store.group.rules[side]
        exact[side] = own = tail.extend(new[side], None)
        length, done, target = own.shape[2], store.packed[side][0], rule.packed(before + 1)
        if target > done:
            store._pack(side, everyone, done, own.narrow(2, length - (body - done), target - done))
            store.packed[side] = [target] * rows
        tail.keep([min(tail.lengths[0], body - max(target, done))] * rows)
        read[side] = min(rule.seen(before), body)
        offsets.append((length - body) % length)
    views = [View(start=0, stop=1, packed=read)]
    return TokenSnapshot(
        before=[before] * rows,
        added=[1] * rows,
        exact=exact,
        views=[views] * rows,
        counts=(*read.values(), body, sinks, before, *offsets),
    )
