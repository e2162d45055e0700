"""Arguments and options of the append launch."""

import torch

from kvq.kernels.append.decode_state import DecodeState, ExactStore
from kvq.kernels.append.kernel import append_tokens
from kvq.kernels.device.launch import Launch, exactly, limit_of, pieces
from kvq.kernels.geometry import sides_of
from kvq.pages.pages import Pages


def append(
    keys: torch.Tensor,
    values: torch.Tensor,
    store: ExactStore,
    pages: Pages,
    state: DecodeState,
    clip: tuple[float, float],
) -> Launch:
    key_side, value_side = sides_of(pages.layout)
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
            float(pages.key_scale),
            float(pages.value_scale),
            (1 - clip[0]) / 2,
            (1 - clip[1]) / 2,
        ),
        constants={
            "K": key_side,
            "V": value_side,
            "RECORD": pages.layout.record_bytes,
            "NEW": new,
            "EVERY": 1 << (head_dim - 1).bit_length(),
            "KEY_CLIP": clip[0] < 1,
            "VALUE_CLIP": clip[1] < 1,
        },
        options=exactly(),
    )
