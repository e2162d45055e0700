"""Decode attention over packed pages and exact tokens: one softmax over

    exact sinks | packed on both sides | packed on one side | exact window

of every sequence, for a few query tokens. ``reference`` computes it densely in torch; ``triton`` never expands a page.
"""

from dataclasses import dataclass, field

import torch

from kvq.kernels.choice import LARGEST_QUERIES, Choice, choose, why_no_layout
from kvq.kernels.plan import DecodePlan
from kvq.pages.pages import Pages


@dataclass(frozen=True, kw_only=True)
class Query:
    """What is asked of the cache.

    q          [B, heads, L, head_dim], the last dimension contiguous; query heads of one KV head are neighbours.
    scale      softmax scale.
    positions  [B] int32: position of query token 0 of each sequence, where the first token of all (a sink, if there are
               sinks) is 0; needed with ``causal``, ``window`` and exact tokens.
    causal     whether packed tokens may be newer than some query token. Exact tokens are masked by position always.
    window     sliding window: a query sees itself and the ``window - 1`` tokens before it.
    softcap    bound of the scores, softcap * tanh(score / softcap).
    sinks      [heads] fp32: a learned logit a query head, in the softmax but without a value.
    """

    q: torch.Tensor
    scale: float
    positions: torch.Tensor | None = None
    causal: bool = False
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Exact:
    """Exact tokens of a batch.

    lengths      [B, 4] int32, counted without the sinks: tokens packed on both sides, as keys, as values, and all.
    keys         [B, KV heads, capacity, head_dim]; token t is at ``(t + key_offsets[b]) % capacity``. values likewise.
    key_offsets, value_offsets  [B] int32, not negative.
    sink_keys, sink_values      [B, KV heads, sinks, head_dim] or None; a shorter sequence uses the first of them.
    mixed_key    whether tokens may be packed as keys and exact as values; mixed_value: the other way round.
    """

    lengths: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    key_offsets: torch.Tensor
    value_offsets: torch.Tensor
    sink_keys: torch.Tensor | None = None
    sink_values: torch.Tensor | None = None
    mixed_key: bool = False
    mixed_value: bool = False

    @property
    def sinks(self) -> int:
        return 0 if self.sink_keys is None else self.sink_keys.shape[2]


@dataclass(frozen=True, kw_only=True)
class Attention:
    """out [B, heads, L, head_dim]; lse [B, heads, L], natural logarithm; ran: what computed it."""

    out: torch.Tensor
    lse: torch.Tensor
    ran: Choice = field(compare=False)


def decode_attention(
    query: Query,
    pages: Pages,
    lengths: torch.Tensor,
    plan: DecodePlan,
    exact: Exact | None = None,
    *,
    out: torch.Tensor | None = None,
    impl: str = "auto",
) -> Attention:
    """Attention of a few query tokens over a batch's cache.

    lengths  [B] int32: packed tokens (on both sides); ``plan.update(lengths)`` must have seen them.
    plan     its batch, heads and layout must be those of the call; it also holds the workspaces.
    out      [B, heads, L, head_dim] to write to, or None for a new tensor.

    Raises KernelError if ``impl="triton"`` is asked for and cannot serve the call.
    """
    q = query.q
    ran = choose(impl, q.device, why_not(query, pages, plan))
    out = torch.empty_like(q) if out is None else out
    B, H, L, _ = q.shape
    if ran.impl == "reference":
        from kvq.kernels.oracle import dense_attention

        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        result, lse = dense_attention(query, pages, lengths, exact, dtype)
        out.copy_(result)
        return Attention(out=out, lse=lse, ran=ran)
    from kvq.kernels.device import launch

    launch.split(plan, pages, lengths, query, 0 if exact is None else exact.sinks).run()
    if exact is not None:
        launch.exact(plan, pages, query, exact).run()
    launch.merge(plan, query, out, exact is not None).run()
    return Attention(out=out, lse=plan.lse.view(B, H, L), ran=ran)


def why_not(query: Query, pages: Pages, plan: DecodePlan) -> str | None:
    """Why the kernels cannot serve a call, or None."""
    q = query.q
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"queries of {str(q.dtype).removeprefix('torch.')}"
    if q.shape[2] > LARGEST_QUERIES:
        return f"{q.shape[2]} query tokens, more than {LARGEST_QUERIES}"
    if plan.ran.impl == "reference":
        return f"the plan was made for the reference ({plan.ran.reason})"
    return why_no_layout(pages.layout)
