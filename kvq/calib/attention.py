"""Attention weights for statistics: of a few probing queries, or what each token gets from many.

The weights are the model's own: causal over a row's real tokens, with its scale, softcap and sink logits. They are
computed apart from the model's attention, which as a rule never materialises them, and for probing queries only: those
at the ends of so many equal parts of a row's real tokens, so that neither batches nor padding matter.

Shape letters: B batch, K KV heads, H query heads, G = H / K, T tokens, D head dim, P probes.
"""

from dataclasses import dataclass

import torch

# Queries of a window that stand for all of them where every token's share is wanted.
QUERIES = 128
# Probes whose scores are held at a time.
_BLOCK = 64


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """scaling: of q . k. softcap: of the scores, or None. sink_logits: learned ones [H], or None.

    unknown   what else the model passes to attention that changes its weights.
    """

    scaling: float
    softcap: float | None = None
    sink_logits: torch.Tensor | None = None
    unknown: tuple[str, ...] = ()


def probe_weights(
    query: torch.Tensor, key: torch.Tensor, valid: torch.Tensor | None, options: AttentionOptions, probes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of probing queries, float [B, H, P, T], and how many each row has, int64 [B].

    Probe j of a row with n real tokens is its token ceil(n (j + 1) / P), counted from 1. A row of fewer tokens than
    probes has each token as a probe once, and zeros after that.
    """
    columns, counts = _probes(key, valid, probes)
    weights = _weights(query, key, valid, columns, options)
    return _only_counted(weights, counts), counts


def received_weights(
    query: torch.Tensor, key: torch.Tensor, valid: torch.Tensor | None, options: AttentionOptions
) -> torch.Tensor:
    """Attention that each token gets from the real queries of its row and all query heads of its KV head, [B, K, T].

    Where a row has more queries than QUERIES, so many of them stand for all, and their weights are scaled up: a row's
    sum is G times its number of tokens (less what sink logits take).
    """
    heads, tokens = key.shape[1:3]
    columns, counts = _probes(key, valid, QUERIES)
    received = torch.zeros(*key.shape[:3], dtype=_dtype(query), device=key.device)
    for start in range(0, min(QUERIES, tokens), _BLOCK):
        part = columns[:, start : start + _BLOCK]
        # Later keys are not seen by this block.
        stop = int(part.max()) + 1
        cut = None if valid is None else valid[:, :stop]
        weights = _only_counted(_weights(query, key[:, :, :stop], cut, part, options), counts - start)
        received[..., :stop] += weights.unflatten(1, (heads, -1)).sum((2, 3))
    real = key.new_full((len(key),), tokens, dtype=torch.int64) if valid is None else valid.sum(1)
    return received * (real / counts.clamp(min=1)).to(received.dtype)[:, None, None]


def _probes(key: torch.Tensor, valid: torch.Tensor | None, probes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns of the probing queries, int64 [B, P], ascending, and how many of them count, int64 [B]."""
    batch, _, tokens, _ = key.shape
    number = torch.arange(1, probes + 1, device=key.device)
    real = torch.full((batch, 1), tokens, device=key.device) if valid is None else valid.sum(1, keepdim=True)
    ranks = torch.where(real > probes, (real * number + probes - 1) // probes, number.expand(batch, -1))
    ranks = torch.minimum(ranks, real.clamp(min=1))
    # The first column at which so many real tokens have been counted.
    columns = ranks - 1 if valid is None else torch.searchsorted(valid.long().cumsum(1), ranks).clamp(max=tokens - 1)
    return columns, real.squeeze(1).clamp(max=probes)


def _only_counted(weights: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """weights [B, H, P, T] with zeros for the probes that do not count."""
    probes = weights.shape[2]
    if bool((counts >= probes).all()):
        return weights
    counted = torch.arange(probes, device=weights.device) < counts[:, None]
    # Not a product: what does not count may be NaN.
    return torch.where(counted[:, None, :, None], weights, 0.0)


def _weights(query, key, valid: torch.Tensor | None, columns: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
    """Softmax of the queries at columns [B, P] of query [B, H, T, D] over key [B, K, T, D], [B, H, P, T]."""
    dtype, heads = _dtype(query), query.shape[1]
    picked = query.gather(2, columns[:, None, :, None].expand(-1, heads, -1, query.shape[3]))
    # The group's heads are more rows of one product, so that keys are not repeated.
    rows = (picked.to(dtype) * options.scaling).unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    scores = (rows @ key.to(dtype).transpose(-1, -2)).view(len(query), heads, -1, key.shape[2])
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    hidden = torch.arange(key.shape[2], device=key.device) > columns[..., None]
    if valid is not None:
        hidden = hidden | ~valid[:, None]
    scores = scores.masked_fill_(hidden[:, None], float("-inf"))
    if options.sink_logits is not None:
        sink = options.sink_logits.to(dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
    return scores.softmax(-1)


def _dtype(query: torch.Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32
