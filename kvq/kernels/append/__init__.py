"""One decode step's tokens: pack what the flush rules release, then store the new ones.

The state of decoding that says how much that is lies on the device (``kvq.kernels.append.decode_state``).
"""

from collections.abc import Mapping

import torch

from kvq.kernels.append.decode_state import DecodeState, ExactStore
from kvq.kernels.dispatch import Choice, choose, why_no_strides
from kvq.kernels.pack import Packed, pack_tokens, why_no_pack
from kvq.kernels.types import Source
from kvq.pages.layout import SIDES
from kvq.pages.pages import Pages


def append_tokens(
    keys: torch.Tensor,
    values: torch.Tensor,
    store: ExactStore,
    pages: Pages,
    state: DecodeState,
    codecs: Mapping[str, Packed],
    *,
    impl: str = "auto",
) -> Choice:
    """Pack what the rules release, then store a step's new keys and values [B, KV heads, L, head_dim], one launch.

    codecs   by side, as ``pack_tokens`` takes them.

    Of sequence b the first ``counters[b, 1] - counters[b, 0]`` new tokens are stored. Raises KernelError if
    ``impl="triton"`` cannot run.
    """
    views = {side: codecs[side].view(pages.layout.page_tokens) for side in SIDES}
    reasons = (why_no_pack(view, pages.layout) for view in views.values())
    obstacle = next((reason for reason in reasons if reason), None) or why_no_strides(keys=keys, values=values)
    ran = choose(impl, keys.device, obstacle)
    if ran.impl == "triton":
        from kvq.kernels.append import launch

        launch.append(keys, values, store, pages, state, views).run()
        return ran
    for i, (side, new, ring, sinks) in enumerate(
        (("key", keys, store.keys, store.sink_keys), ("value", values, store.values, store.sink_values))
    ):
        ranges = state.counters[:, 2 + 2 * i : 4 + 2 * i].contiguous()
        source = Source(x=ring, ranges=ranges, offsets=state.zeros, longest=ring.shape[2])
        pack_tokens(source, pages, side, codecs[side], impl="reference")
        for b, (before, total) in enumerate(state.counters[:, :2].tolist()):
            for t in range(before, total):
                target, at = (sinks, t) if t < state.sinks else (ring, (t - state.sinks) % ring.shape[2])
                target[b, :, at] = new[b, :, t - before].to(target.dtype)
    return ran
