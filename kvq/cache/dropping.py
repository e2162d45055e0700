"""Dropping tokens of a store for good: what token policies decide, by sequence and KV head."""

from collections.abc import Sequence

import numpy as np
import torch

from kvq.cache.kept import Kept
from kvq.cache.store import RECORDED_TOKENS, HeadStore
from kvq.errors import CacheError
from kvq.pages.layout import SIDES


def drop(store: HeadStore, gone: Sequence[torch.Tensor]) -> None:
    """Forget tokens of a store. ``gone``: by sequence, bool [KV heads, seen tokens] on the CPU, True = forget; tokens
    that were dropped before may be marked again.

    Those that stay move together in the exact window and are packed in groups of their own; nothing is rounded twice.
    Raises CacheError, and drops nothing, for sinks, for tokens that are quantized or may yet be cropped, and where
    heads that are stored together would keep different tokens.
    """
    store.settle()
    if store.split == 1 and any(bool((own != own[:1]).any()) for own in gone):
        raise CacheError(
            "heads that are stored together cannot drop different tokens: store their group by head "
            "(HeadGroup.by_head), or drop the same tokens of all."
        )
    kept = store.kept or Kept(len(store.seen))
    seen = [kept.seen(row, 0, stored) for row, stored in enumerate(store.stored)]
    marked = [head.numpy() for own in gone for head in own[: store.split]]
    # By row, which of its stored tokens go.
    marked = [mark[own] for mark, own in zip(marked, seen, strict=True)]
    for row, mark in enumerate(marked):
        _check(store, row, mark)
    for side in SIDES:
        tail = store.tails[side]
        chosen = torch.ones(len(marked), tail.longest, dtype=torch.bool)
        for length, mark, own in zip(tail.lengths, marked, chosen):
            if length:
                own[-length:] = torch.from_numpy(~mark[-length:])
        if tail.longest:
            tail.choose(chosen)
    for row, mark in enumerate(marked):
        kept.drop(row, seen[row][mark])
        store.stored[row] -= int(mark.sum())
    store.kept = kept if any(kept.dropped) else None
    if not store.holding:
        store.release()


def _check(store: HeadStore, row: int, mark: np.ndarray) -> None:
    first = store.group.sinks + max(store.packed[side][row] for side in SIDES)
    last = max(0, len(mark) - RECORDED_TOKENS) if store.recording else len(mark)
    if mark[:first].any():
        raise CacheError(
            f"cannot drop stored token {int(mark.argmax())} of row {row}, whose first {first} are sinks or quantized "
            "for good: drop tokens while they are exact, before the rules release them (PackedLayer.hold)."
        )
    if mark[last:].any():
        raise CacheError(
            f"cannot drop any of the newest {RECORDED_TOKENS} tokens while past recording is on, as a crop may take "
            "them back: drop older ones."
        )
