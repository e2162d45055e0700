"""What a packed layer shows of its attention, and the log-sum-exp of a prompt's exact attention, which SDPA keeps.

Scores by token are columns of A_ij = exp(s q_i . k_j - lse_i): with the log-sum-exp of a query's whole row, whoever
scores reads only the columns that it asks about. Nothing is computed for a layer without observers.
"""

from typing import Any, Protocol

import torch

from kvq.cache.attend import TILE_SCORES, Options


class Observer(Protocol):
    """Whoever is registered in ``PackedLayer.observers``; a copy of a cache has copies of its observers."""

    def after_attention(self, layer: Any, queries: torch.Tensor, lse: torch.Tensor) -> None:
        """kvq's attention has read ``layer``, a ``PackedLayer``.

        queries  [B, H, L, D] in the model's own basis, after the rotary embedding, as the attention function got them.
        lse      [B, H, L] float32 (float64 for such queries): the log-sum-exp of each query's logits over all that it
                 saw, in that basis: scaled, softcap applied, a learned sink logit included. Minus infinity for pads.

        Model layers that share this layer's keys call too, each with its own queries.
        """
        ...


@torch.no_grad()
def prompt_lse(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    valid: torch.Tensor | None,
    options: Options,
) -> torch.Tensor:
    """Log-sum-exp [B, H, L] of query [B, H, L, D] over the exact keys [B, kv_heads, L, D] of a prompt.

    mask   [B or 1, 1, L, L] (bool, True = attend, or additive), None for the causal one; valid [B, L]: real tokens.

    Scores are held for as many queries as ``TILE_SCORES`` has room for, at least for one.
    """
    B, H, L, D = query.shape
    K, T = key.shape[1:3]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    keys = key.to(dtype).transpose(-1, -2)
    lse = query.new_empty(B, H, L, dtype=dtype)
    step = max(1, TILE_SCORES // (B * H * T))
    for start in range(0, L, step):
        stop = min(start + step, L)
        queries = query[:, :, start:stop].to(dtype) * options.scaling
        scores = (queries.reshape(B, K, -1, D) @ keys).view(B, H, stop - start, T)
        if options.softcap is not None:
            scores = options.softcap * torch.tanh(scores / options.softcap)
        if mask is None:
            order = torch.arange(T, device=scores.device)
            scores.masked_fill_(order > order[start:stop].unsqueeze(1), -torch.inf)
        elif mask.dtype == torch.bool:
            scores.masked_fill_(~mask[:, :, start:stop], -torch.inf)
        else:
            scores += mask[:, :, start:stop]
        lse[:, :, start:stop] = scores.logsumexp(-1)
    if options.sink_logits is not None:
        lse = torch.logaddexp(lse, options.sink_logits.to(dtype).view(1, H, 1))
    return lse if valid is None else lse.masked_fill(~valid.to(lse.device).unsqueeze(1), -torch.inf)
