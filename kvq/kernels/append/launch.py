"""Arguments and options of the append launch."""

from collections.abc import Mapping

import torch

from kvq.kernels.append.decode_state import DecodeState, ExactStore
from kvq.kernels.append.kernel import append_tokens
from kvq.kernels.device.launch import Launch, exactly, limit_of, pieces
from kvq.kernels.geometry import sides_of
from kvq.kernels.pack.launch import encoding_of
from kvq.pages.pages import Pages
from kvq.pages.view import View


def append(
    keys: torch.Tensor,
    values: torch.Tensor,
    store: ExactStore,
    pages: Pages,
    state: DecodeState,
    views: Mapping[str, View],
) -> Launch:
    """``views`` by side, of what the kernels pack."""
    key_side, value_side = sides_of(pages.layout)
    key, key_numbers = encoding_of(views["key"], key_side)
    value, value_numbers = encoding_of(views["value"], value_side)
    new, head_dim = keys.shape[2], keys.shape[3]
    flushed = max(state.key.flushed(state.most_new), state.value.flushed(state.most_new))
    sinks = store.sink_keys
    return Launch(
        kernel=append_tokens,
        grid=(pieces(flushed, key_side.page_tokens), keys.shape[0], 2 * pages.heads),
        args=(
            keys,
            values,
            store.keys,
            store.values,
            sinks,
            store.sink_values,
            state.counters,
            pages.pool.base,
            pages.table,
            limit_of(pages, state.zeros),
            *keys.stride()[:3],
            *values.stride()[:3],
            *store.keys.stride()[:3],
            store.keys.shape[2],
            *store.values.stride()[:3],
            store.values.shape[2],
            *sinks.stride()[:3],
            state.sinks,
            pages.table.stride(0),
            pages.pool.unit,
            key_numbers,
            value_numbers,
        ),
        constants={
            "K": key_side,
            "V": value_side,
            "KEY": key,
            "VALUE": value,
            "RECORD": pages.layout.record_bytes,
            "NEW": new,
            "EVERY": 1 << (head_dim - 1).bit_length(),
        },
        options=exactly(),
    )
