"""The state of decoding on the device, and the append that goes with it: nothing a step does needs the host.

    state = DecodeState(batch=B, sinks=4, key=FlushRule(window=128), value=..., device=...)
    store = ExactStore.empty(state, heads=..., head_dim=..., dtype=...)          one for every layer
    each step:   state.advance(1)
                 plan.update(state.lengths)
                 for every layer: append_tokens(k, v, store, pages, state)
                                  decode_attention(..., exact=store.exact(state))

A query that is itself token n reads what the n tokens before it left: a rule is a ``FlushRule`` without sinks. What
a rule releases is packed at the next step's append, from the exact numbers, before the new tokens are stored.
"""

from dataclasses import dataclass

import torch

from kvq.kernels.attention import Exact
from kvq.kernels.choice import Choice, choose, why_no_layout
from kvq.kernels.packing import Rotation, Source, pack_tokens, rotate_reference
from kvq.pages.flush import FlushRule
from kvq.pages.pages import Pages

COUNTERS = 8


class DecodeState:
    """Counters of a batch, on the device.

    batch      sequences; sinks: first tokens that stay exact; key, value: their rules.
    most_new   most tokens of a step.
    lengths    [B] int32: tokens packed on both sides, as the step's queries read them.
    positions  [B] int32: position of the step's first token.
    exact_lengths  [B, 4] int32, see ``Exact.lengths``.
    counters   [B, 8] int32: tokens before the step and with it, keys packed before and with it, values likewise.

    ran   what the last ``advance`` ran on.
    """

    def __init__(
        self,
        *,
        batch: int,
        sinks: int,
        key: FlushRule,
        value: FlushRule,
        most_new: int = 1,
        device: torch.device | str = "cpu",
        impl: str = "auto",
    ):
        self.batch, self.sinks, self.key, self.value, self.most_new = batch, sinks, key, value, most_new
        self.device = torch.device(device)
        self.impl = impl
        self.ran = choose(impl, self.device)
        made = {"dtype": torch.int32, "device": self.device}
        self.counters = torch.zeros(batch, COUNTERS, **made)
        self.exact_lengths = torch.zeros(batch, 4, **made)
        self.lengths = torch.zeros(batch, **made)
        self.positions = torch.zeros(batch, **made)
        self.zeros = torch.zeros(batch, **made)

    def start(self, stored: torch.Tensor) -> None:
        """Set sequences to ``stored`` [B] tokens, with all packed that the rules release (as a prompt leaves them)."""
        body = (stored.to(self.counters) - self.sinks).clamp_min(0)
        self.counters.zero_()
        self.counters[:, 1] = stored.to(self.counters)
        for column, rule in ((3, self.key), (5, self.value)):
            self.counters[:, column] = rule.packed(body)

    def advance(self, new: int | torch.Tensor) -> None:
        """Move on by ``new`` tokens, one number or [B] int32 on the device, at most ``most_new``."""
        if self.ran.impl == "triton":
            from kvq.kernels.device import launch

            launch.advance(self, new).run()
            return
        c = self.counters
        before, key_done, value_done = c[:, 1].clone(), c[:, 3].clone(), c[:, 5].clone()
        body = (before - self.sinks).clamp_min(0)
        ends = []
        for rule, done in ((self.key, key_done), (self.value, value_done)):
            ends.append(torch.maximum(rule.packed(body), done))
        total = before + new
        for column, value in enumerate((before, total, key_done, ends[0], value_done, ends[1])):
            c[:, column] = value
        low = torch.minimum(*ends)
        self.exact_lengths.copy_(torch.stack([low, *ends, (total - self.sinks).clamp_min(0)], dim=1))
        self.lengths.copy_(low)
        self.positions.copy_(before)


@dataclass(frozen=True, kw_only=True)
class ExactStore:
    """One layer's exact tokens: rings [B, KV heads, capacity, head_dim], and sinks [B, KV heads, n, head_dim]."""

    keys: torch.Tensor
    values: torch.Tensor
    sink_keys: torch.Tensor
    sink_values: torch.Tensor

    @classmethod
    def empty(cls, state: DecodeState, *, heads: int, head_dim: int, dtype: torch.dtype) -> "ExactStore":
        def ring(tokens: int) -> torch.Tensor:
            return torch.zeros(state.batch, heads, tokens, head_dim, dtype=dtype, device=state.device)

        return cls(
            keys=ring(state.key.longest(state.most_new)),
            values=ring(state.value.longest(state.most_new)),
            sink_keys=ring(state.sinks),
            sink_values=ring(state.sinks),
        )

    def exact(self, state: DecodeState) -> Exact:
        """As ``decode_attention`` takes them."""
        return Exact(
            lengths=state.exact_lengths,
            keys=self.keys,
            values=self.values,
            key_offsets=state.zeros,
            value_offsets=state.zeros,
            sink_keys=self.sink_keys if state.sinks else None,
            sink_values=self.sink_values if state.sinks else None,
            mixed_key=state.key != state.value,
            mixed_value=state.key != state.value,
        )


def append_tokens(
    keys: torch.Tensor,
    values: torch.Tensor,
    store: ExactStore,
    pages: Pages,
    state: DecodeState,
    *,
    rotations: dict[str, Rotation] | None = None,
    clip: tuple[float, float] = (1.0, 1.0),
    impl: str = "auto",
) -> Choice:
    """Pack what the rules release, then store a step's new keys and values [B, KV heads, L, head_dim], one launch.

    rotations   by side, applied to the new tokens on the way; queries and outputs are the caller's.
    clip        of keys and of values, see ``pack_tokens``.

    Of sequence b the first ``counters[b, 1] - counters[b, 0]`` new tokens are stored. Raises KernelError if
    ``impl="triton"`` cannot run.
    """
    rotations = rotations or {}
    obstacle = why_no_layout(pages.layout)
    for rotation in rotations.values():
        if rotation.block & (rotation.block - 1) or not 16 <= rotation.block <= 256:
            obstacle = f"rotation of blocks of {rotation.block} channels, not a power of two from 16 to 256"
    ran = choose(impl, keys.device, obstacle)
    if ran.impl == "triton":
        from kvq.kernels.device import launch

        launch.append(keys, values, store, pages, state, rotations, clip).run()
        return ran
    for i, (side, new, ring, sinks) in enumerate(
        (("key", keys, store.keys, store.sink_keys), ("value", values, store.values, store.sink_values))
    ):
        ranges = state.counters[:, 2 + 2 * i : 4 + 2 * i].contiguous()
        source = Source(x=ring, ranges=ranges, offsets=state.zeros, longest=ring.shape[2])
        pack_tokens(source, pages, side, clip=clip[i], impl="reference")
        if side in rotations:
            new = rotate_reference(new, rotations[side]).to(new.dtype)
        for b, (before, total) in enumerate(state.counters[:, :2].tolist()):
            for t in range(before, total):
                target, at = (sinks, t) if t < state.sinks else (ring, (t - state.sinks) % ring.shape[2])
                target[b, :, at] = new[b, :, t - before].to(target.dtype)
    return ran
