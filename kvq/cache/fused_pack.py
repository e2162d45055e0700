"""A store's pages as the Triton kernels take them, and packing into them."""

import torch

from kvq.codecs.base import StaticNumbers
from kvq.kernels.pack import pack_tokens
from kvq.kernels.types import Source
from kvq.pages.layout import SIDES
from kvq.pages.pages import Pages


def pages_of(store, rows: list[int] | None = None) -> Pages:
    """The pages of some rows (all by default), as kernels take them."""
    table = store.tables.numbers
    everyone = rows is None or len(rows) == len(table)
    if everyone and store.all_pages is not None and store.all_pages.numbers is table:
        return store.all_pages
    numbers = [store.group.codecs[side].static_numbers() for side in SIDES]
    key, value = (n if isinstance(n, StaticNumbers) else StaticNumbers() for n in numbers)
    found = Pages(
        pool=store.pool,
        numbers=table if everyone else table[rows],
        key_scale=key.scale,
        value_scale=value.scale,
        key_levels=key.levels,
        value_levels=value.levels,
    )
    if everyone:
        store.all_pages = found
    return found


def pack(store, side: str, rows: list[int], start: int, tokens: torch.Tensor) -> None:
    """Quantize tokens [rows, kv_heads, t, head_dim] from body token ``start`` and write them to the rows' pages."""
    ranges = torch.tensor([[start, start + tokens.shape[2]]], dtype=torch.int32).expand(len(rows), 2)
    ranges = ranges.contiguous().to(tokens.device, non_blocking=True)
    source = Source(x=tokens, ranges=ranges, offsets=-ranges[:, 0].contiguous(), longest=tokens.shape[2])
    pack_tokens(source, pages_of(store, rows), side, store.group.codecs[side], impl="triton")
