"""Dense attention over the same packed bytes, straight from the definition: the reference, and in fp64 the oracle."""

import torch

from kvq.kernels.types import Exact, KeyFrame, Query
from kvq.pages.pages import Pages


def dense_attention(
    query: Query,
    pages: Pages,
    lengths: torch.Tensor,
    exact: Exact | None,
    dtype: torch.dtype,
    frame: KeyFrame | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [B, heads, L, head_dim], lse [B, heads, L]) in ``dtype``; a query that sees nothing gets 0 and -inf."""
    outs, lses = [], []
    for b in range(query.q.shape[0]):
        keys, values = _tokens(b, query, pages, lengths, exact, dtype, frame)
        out, lse = _attend(b, query, keys, values, dtype)
        outs.append(out)
        lses.append(lse)
    return torch.stack(outs), torch.stack(lses)


def _tokens(b: int, query, pages, lengths, exact, dtype, frame) -> tuple[torch.Tensor, torch.Tensor]:
    """All keys and values of one sequence in order of position, [KV heads, tokens, head_dim]."""
    found = []
    for side in ("key", "value"):
        packed = int(lengths[b]) if exact is None else int(exact.lengths[b, 1 if side == "key" else 2])
        used = -(-packed // pages.layout.page_tokens)
        parts = []
        if exact is not None and exact.sink_keys is not None:
            newest = int(query.positions[b]) + query.q.shape[2]
            sinks = exact.sink_keys if side == "key" else exact.sink_values
            parts.append(sinks[b, :, : min(sinks.shape[2], newest)].to(dtype))
        if used:
            numbers = pages.part(0, used, [b]).dense(side, dtype)[0, :, :packed]
            parts.append(frame.left(b, numbers) if side == "key" and frame is not None else numbers)
        if exact is not None:
            ring = exact.keys if side == "key" else exact.values
            offset = int((exact.key_offsets if side == "key" else exact.value_offsets)[b])
            token = torch.arange(packed, int(exact.lengths[b, 3]), device=ring.device)
            parts.append(ring[b, :, (token + offset) % ring.shape[2]].to(dtype))
        empty = query.q.new_zeros(pages.heads, 0, query.q.shape[3], dtype=dtype)
        found.append(torch.cat(parts, dim=1) if parts else empty)
    return found[0], found[1]


def _attend(b: int, query, keys, values, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    q = query.q[b].to(dtype)
    heads, L, _ = q.shape
    repeat = heads // keys.shape[0]
    scores = q @ keys.repeat_interleave(repeat, 0).transpose(-1, -2) * query.scale
    if query.softcap is not None:
        scores = query.softcap * torch.tanh(scores / query.softcap)
    if query.positions is not None:
        own = int(query.positions[b]) + torch.arange(L, device=q.device).unsqueeze(1)
        token = torch.arange(keys.shape[1], device=q.device)
        hidden = token > own
        if query.window is not None:
            hidden = hidden | (token <= own - query.window)
        scores = scores.masked_fill(hidden, -torch.inf)
    if query.sink_logits is not None:
        logit = query.sink_logits.to(dtype).view(heads, 1, 1).expand(heads, L, 1)
        scores = torch.cat([scores, logit], dim=-1)
        values = (
            torch.cat([values, torch.zeros_like(values[:, :1])], dim=1)
            if values.shape[1]
            else torch.zeros(values.shape[0], 1, values.shape[2], dtype=dtype, device=values.device)
        )
    lse = scores.logsumexp(-1)
    weights = torch.where(lse.unsqueeze(-1) == -torch.inf, torch.zeros_like(scores), (scores - lse.unsqueeze(-1)).exp())
    return weights @ values.repeat_interleave(repeat, 0), lse
