"""One decode step's tokens: pack what the flush rules release, then store the new ones.

The state of decoding that says how much that is lies on the device (``kvq.kernels.append.decode_state``).
"""

import torch

from kvq.kernels.append.decode_state import DecodeState, ExactStore
from kvq.kernels.dispatch import Choice, choose, why_no_layout, why_no_strides
from kvq.kernels.pack import pack_tokens
from kvq.kernels.types import Source
from kvq.pages.pages import Pages


def append_tokens(
    keys: torch.Tensor,
    values: torch.Tensor,
    store: ExactStore,
    pages: Pages,
    state: DecodeState,
    *,
    clip: tuple[float, float] = (1.0, 1.0),
    impl: str = "auto",
) -> Choice:
    """Pack what the rules release, then store a step's new keys and values [B, KV heads, L, head_dim], one launch.

    clip   of keys and of values, see ``pack_tokens``.

    Of sequence b the first ``counters[b, 1] - counters[b, 0]`` new tokens are stored. Raises KernelError if
    ``impl="triton"`` cannot run.
    """
    ran = choose(impl, keys.device, why_no_layout(pages.layout) or why_no_strides(keys=keys, values=values))
    if ran.impl == "triton":
        from kvq.kernels.append import launch

        launch.append(keys, values, store, pages, state, clip).run()
        return ran
    for i, (side, new, ring, sinks) in enumerate(
        (("key", keys, store.keys, store.sink_keys), ("value", values, store.values, store.sink_values))
    ):
        ranges = state.counters[:, 2 + 2 * i : 4 + 2 * i].contiguous()
        source = Source(x=ring, ranges=ranges, offsets=state.zeros, longest=ring.shape[2])
        pack_tokens(source, pages, side, clip=clip[i], impl="reference")
        for b, (before, total) in enumerate(state.counters[:, :2].tolist()):
            for t in range(before, total):
                target, at = (sinks, t) if t < state.sinks else (ring, (t - state.sinks) % ring.shape[2])
                target[b, :, at] = new[b, :, t - before].to(target.dtype)
    return ran
