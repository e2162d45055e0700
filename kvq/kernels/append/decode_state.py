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

from kvq.kernels.dispatch import choose
from kvq.kernels.types import Exact
from kvq.pages.flush import FlushRule

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
            from kvq.kernels.append.advance import advance_launch

            advance_launch(vars(self), new, self.sinks, self.key, self.value).run()
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
