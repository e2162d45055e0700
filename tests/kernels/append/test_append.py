"""Append: pages, rings and sinks after some steps are those of bulk packing."""

import pytest
import torch

from kvq.bench.samples import codecs_of, layout_of
from kvq.kernels.append import append_tokens
from kvq.kernels.append.decode_state import DecodeState, ExactStore
from kvq.kernels.pack import pack_tokens
from kvq.kernels.unpack import unpack_pages
from kvq.pages.flush import FlushRule


@pytest.mark.parametrize(
    ("key", "value", "head_dim"), [("4", "4", 64), ("2c32", "2/32", 64), ("3c64", "e4m3", 64)], ids=str
)
def test_appending_token_by_token_gives_the_bytes_of_bulk_packing(key, value, head_dim, device, empty_pages, source_of):
    """Pages, rings and sinks after 200 steps' worth of tokens; keys flush in blocks where they are per channel."""
    layout, codecs = layout_of(key, value, head_dim), codecs_of(key, value, head_dim)
    unit = layout.key.group if layout.key.axis == "channel" else 1
    rules = {
        "key": FlushRule(window=unit, unit=unit) if unit > 1 else FlushRule(window=5),
        "value": FlushRule(window=5),
    }
    x = torch.randn(2, 2, 140, head_dim, generator=torch.Generator().manual_seed(0)).to(device)
    pages = empty_pages(layout, 2, 2, 3, device)
    state = DecodeState(
        batch=2, sinks=2, **rules, most_new=4, device=device, impl="triton" if device.type == "cuda" else "reference"
    )
    store = ExactStore.empty(state, heads=2, head_dim=head_dim, dtype=x.dtype)
    # A prompt of 120 and of 70 tokens, then steps of one to four tokens.
    stored = torch.tensor([120, 70])
    state.start(stored)
    body = {side: state.counters[:, 3 if side == "key" else 5].tolist() for side in rules}
    for side, ring, sinks in (("key", store.keys, store.sink_keys), ("value", store.values, store.sink_values)):
        pack_tokens(source_of(x[:, :, 2:], [(0, n) for n in body[side]]), pages, side, codecs[side], impl="reference")
        for b in range(2):
            sinks[b] = x[b, :, :2]
            for t in range(body[side][b], int(stored[b]) - 2):
                ring[b, :, t % ring.shape[2]] = x[b, :, 2 + t]
    for new in (1, 3, 4, 1, 2, 1):
        state.advance(new)
        fresh = torch.stack([x[b, :, n : n + new] for b, n in enumerate(state.counters[:, 0].tolist())])
        assert append_tokens(fresh, fresh, store, pages, state, codecs, impl="triton").impl == "triton"
    want = empty_pages(layout, 2, 2, 3, device)
    for side, column in (("key", 3), ("value", 5)):
        done = state.counters[:, column].tolist()
        assert done != body[side]
        pack_tokens(source_of(x[:, :, 2:], [(0, n) for n in done]), want, side, codecs[side], impl="reference")
    for side, column in (("key", 3), ("value", 5)):
        lengths = state.counters[:, column].contiguous()
        dense = [torch.zeros(2, 2, 192, head_dim, device=device) for _ in range(2)]
        for made, out in zip((pages, want), dense):
            unpack_pages(made, side, lengths, out, impl="reference")
        assert torch.equal(*dense)
        assert dense[0].any()
    assert torch.equal(pages.pool.value_limit, want.pool.value_limit)
    for b in range(2):
        total, packed = state.counters[b, 1] - 2, state.counters[b, 5]
        for t in range(int(packed), int(total)):
            assert torch.equal(store.values[b, :, t % store.values.shape[2]], x[b, :, 2 + t])
