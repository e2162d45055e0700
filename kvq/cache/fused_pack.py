"""A store's pages as the Triton kernels take them, and packing into them."""

import torch

from kvq.codecs.base import StaticNumbers
from kvq.kernels.pack import pack_tokens
from kvq.kernels.types import Source
from kvq.pages.layout import SIDES
from kvq.pages.pages import Pages

# Page numbers count steps of so many bytes.
_UNIT = 16


def pages_of(store, rows: list[int] | None = None) -> Pages:
    """The pages of some rows (all by default), by their distance from the arena's first page: slabs lie anywhere."""
    if store.kernel_table is None:
        store.kernel_table = _table(store)
    table, slabs = store.kernel_table, store.arena.slabs
    numbers = [store.group.codecs[side].static_numbers() for side in SIDES]
    key, value = (n if isinstance(n, StaticNumbers) else StaticNumbers() for n in numbers)
    return Pages(
        layout=store.group.layout,
        pool=slabs[0].view(-1) if slabs else torch.zeros(_UNIT, dtype=torch.uint8, device=table.device),
        table=table if rows is None or len(rows) == len(table) else table[rows],
        heads=len(store.group.heads),
        stride=_UNIT,
        key_scale=key.scale,
        value_scale=value.scale,
        key_levels=key.levels,
        value_levels=value.levels,
    )


def _table(store) -> torch.Tensor:
    """[B, pages] int64, made anew whenever a page is added."""
    longest = max(map(len, store.tables), default=0)
    table = torch.zeros(len(store.tables), max(1, longest), dtype=torch.int64)
    if longest:
        first = store.arena.slabs[0].data_ptr()
        for row, ids in enumerate(store.tables):
            if ids:
                table[row, : len(ids)] = torch.from_numpy((store.arena.addresses(ids) - first) // _UNIT)
    return table.to(store.arena.device)


def pack(store, side: str, rows: list[int], start: int, tokens: torch.Tensor) -> None:
    """Quantize tokens [rows, kv_heads, t, head_dim] from body token ``start`` and write them to the rows' pages."""
    ranges = torch.tensor([[start, start + tokens.shape[2]]], dtype=torch.int32).expand(len(rows), 2)
    ranges = ranges.contiguous().to(tokens.device, non_blocking=True)
    source = Source(x=tokens, ranges=ranges, offsets=-ranges[:, 0].contiguous(), longest=tokens.shape[2])
    pack_tokens(source, pages_of(store, rows), side, impl="triton")
