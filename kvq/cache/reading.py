"""What a store holds, as dense tensors or as the pages that hold it: for reference attention and for whoever looks."""

import torch

from kvq.cache.snapshot import Snapshot
from kvq.cache.store import HeadStore
from kvq.pages.pages import Pages


def stored_tokens(store: HeadStore, side: str, rows: list[int], snapshot: Snapshot | None = None) -> torch.Tensor:
    """All stored tokens of rows of equal length, [len(rows), heads, tokens, head_dim], packed ones decoded; in the
    basis of the group's transforms.

    With a snapshot, as its queries see them; without, as they are stored.
    """
    store.settle()
    row, sinks = rows[0], store.group.sinks
    count, done = store.stored[row], store.packed[side][row]
    if snapshot is not None and snapshot.added[row]:
        count, done = snapshot.before[row] + snapshot.added[row], snapshot.views[row][0].packed[side]
    exact = max(0, count - sinks) - done
    if snapshot is None:
        tail = store.tails[side].last(rows, exact)
    else:
        tail = snapshot.exact[side]
        tail = tail[rows][:, :, tail.shape[2] - exact :]
    parts = [store.sinks[side][rows][:, :, : min(count, sinks)]] if side in store.sinks else []
    if done:
        parts.append(decoded(store, side, rows, 0, done, torch.promote_types(tail.dtype, torch.float32)).to(tail.dtype))
    return torch.cat([*parts, tail], dim=2)


def decoded(store: HeadStore, side: str, rows: list[int], start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
    """Packed body tokens [start, stop) of rows, [len(rows), heads, stop - start, head_dim], as exact ones are: in the
    basis of the group's transforms, keys after the rotary embedding."""
    pages, first = pages_with(store, rows, start, stop)
    numbers = store.group.codecs[side].dequantized(pages, side, dtype)[:, :, start - first : stop - first]
    if side == "key":
        return unframed(store, numbers, rows, start, stop)
    return numbers if store.group.value_frame is None else store.group.value_frame.leave(numbers)


def unframed(store: HeadStore, keys: torch.Tensor, rows: list[int], start: int, stop: int) -> torch.Tensor:
    """Decoded keys of body tokens [start, stop), [len(rows), heads, tokens, head_dim], where exact ones stand."""
    if store.group.frame is None:
        return keys
    return store.group.frame.leave(keys, store.origins_by_token(rows, start, stop))


def pages_with(store: HeadStore, rows: list[int], start: int, stop: int) -> tuple[Pages, int]:
    """The pages that hold body tokens [start, stop) of rows, and the first body token in them."""
    size = store.group.layout.page_tokens
    first, last = start // size, -(-stop // size)
    ids = [store.tables.rows[row][first:last] for row in rows]
    return Pages(pool=store.pool, ids=ids, tokens=None if store.pool.owned else stop - first * size), first * size
