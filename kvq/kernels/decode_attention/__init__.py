"""Decode attention over packed pages and exact tokens: one softmax over

    exact sinks | packed on both sides | packed on one side | exact window

of every sequence, for a few query tokens. ``reference`` computes it densely in torch; ``triton`` never expands a page.
"""

import torch

from kvq.kernels.decode_attention.decode_plan import DecodePlan
from kvq.kernels.decode_attention.reference import dense_attention
from kvq.kernels.dispatch import LARGEST_QUERIES, choose, why_no_attention, why_no_strides
from kvq.kernels.types import Attention, Exact, KeyFrame, Query
from kvq.pages.pages import Pages


def decode_attention(
    query: Query,
    pages: Pages,
    lengths: torch.Tensor,
    plan: DecodePlan,
    exact: Exact | None = None,
    *,
    frame: KeyFrame | None = None,
    out: torch.Tensor | None = None,
    impl: str = "auto",
) -> Attention:
    """Attention of a few query tokens over a batch's cache.

    lengths  [B] int32: packed tokens (on both sides); ``plan.update(lengths)`` must have seen them.
    plan     its batch, heads, layout and blocks of the frame must be those of the call; it also holds the workspaces.
    frame    where packed keys stand; None: where queries do.
    out      [B, heads, L, head_dim] to write to, or None for a new tensor.

    Raises KernelError if ``impl="triton"`` is asked for and cannot serve the call.
    """
    q = query.q
    out = torch.empty_like(q) if out is None else out
    strides = {"queries": q, "out": out}
    if exact is not None:
        strides |= {"keys": exact.keys, "values": exact.values, "sinks": exact.sink_keys}
    ran = choose(impl, q.device, why_not(query, pages, plan, frame) or why_no_strides(**strides))
    B, H, L, _ = q.shape
    if ran.impl == "reference":
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        result, lse = dense_attention(query, pages, lengths, exact, dtype, frame)
        out.copy_(result)
        return Attention(out=out, lse=lse, ran=ran)
    from kvq.kernels.decode_attention import launch

    launch.split(plan, pages, lengths, query, 0 if exact is None else exact.sinks, frame).run()
    if exact is not None:
        launch.exact(plan, pages, query, exact, frame).run()
    launch.merge(plan, query, out, exact is not None).run()
    return Attention(out=out, lse=plan.lse.view(B, H, L), ran=ran)


def why_not(query: Query, pages: Pages, plan: DecodePlan, frame: KeyFrame | None = None) -> str | None:
    """Why the kernels cannot serve a call, or None."""
    q = query.q
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"queries of {str(q.dtype).removeprefix('torch.')}"
    if q.shape[2] > LARGEST_QUERIES:
        return f"{q.shape[2]} query tokens, more than {LARGEST_QUERIES}"
    if plan.ran.impl == "reference":
        return f"the plan was made for the reference ({plan.ran.reason})"
    if plan.frame != (0 if frame is None else frame.block):
        return f"the plan was made for keys relative to blocks of {plan.frame} tokens (0: none)"
    return why_no_attention(pages.layout, plan.frame)
