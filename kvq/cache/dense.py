"""What a packed layer stores as dense tensors: for other attention functions, and for whoever looks."""

from typing import Any

import torch

from kvq.cache.reading import stored_tokens
from kvq.cache.snapshot import Snapshot, group_rows
from kvq.cache.store import HeadStore


def dense(layer: Any, side: str, snapshots: list[Snapshot] | None) -> torch.Tensor:
    """Dequantized tensor [B, kv_heads, columns, head_dim] of a ``PackedLayer``; pads and dropped tokens are zero.

    With snapshots, as the update's queries must see it; without, as it is stored now.
    """
    heads = sum(len(group.heads) for group in layer.groups)
    shape = layer.batch, heads, layer.length, layer.groups[0].head_dim
    out = torch.zeros(shape, dtype=layer.dtype, device=layer.device)
    for i, store in enumerate(layer.stores):
        store.settle()
        own = list(store.group.heads)
        snapshot = snapshots[i] if snapshots else None
        if store.split > 1 or store.kept is not None:
            out[:, own] = _by_row(layer, store, side, snapshot)
            continue
        keys = list(zip(snapshot.before, snapshot.added)) if snapshot else [(n, 0) for n in store.stored]
        for rows in group_rows(keys):
            found = store.chains[side].inverse(stored_tokens(store, side, rows, snapshot))
            for j, b in enumerate(rows):
                target = found[j] if layer.real is None else _scatter(found[j], layer.real[b].to(found.device))
                out[b, own] = target
    return out


def _by_row(layer: Any, store: HeadStore, side: str, snapshot: Snapshot | None) -> torch.Tensor:
    """The same of one store whose rows are heads, or differ in what they keep: [B, heads, columns, head_dim]."""
    shape = layer.batch, len(store.group.heads), layer.length, store.group.head_dim
    found = torch.zeros(shape, dtype=layer.dtype, device=layer.device)
    stored = torch.zeros(shape[:3], dtype=torch.bool, device=layer.device)
    for row, count in enumerate(store.stored):
        b, head = divmod(row, store.split)
        heads = head if store.split > 1 else slice(None)
        columns = torch.arange(layer.length) if layer.real is None else layer.real[b].nonzero().squeeze(1)
        if store.kept is not None:
            columns = columns[store.kept.seen(row, 0, count)]
        found[b, heads, columns] = stored_tokens(store, side, [row], snapshot)[0].to(found).squeeze(0)
        stored[b, heads, columns] = True
    return store.chains[side].inverse(found).masked_fill_(~stored.unsqueeze(-1), 0)


def _scatter(tokens: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Put tokens [kv_heads, n, head_dim] at the real columns of [kv_heads, columns, head_dim]."""
    out = tokens.new_zeros(tokens.shape[0], len(real), tokens.shape[2])
    out[:, real] = tokens
    return out
