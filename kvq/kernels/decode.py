"""Attention over packed pages: the two products, and the exact merge of partial results. Torch reference.

Scale and minimum are folded as far as the algebra allows (quantizer c*s + m, query q, weights p):

    axis token     score_t = s_t * (q . c_t) + m_t * sum(q)          out = sum_t (p_t s_t) c_t + sum_t p_t m_t
    axis channel   codes are scaled in place, the minimum is one dot per token group

so a page is never expanded beyond one tile of planes. Shapes: B rows, K KV heads, M queries that share a KV head
(group x query tokens), P pages, T = P * page_tokens, D head_dim.
"""

import math

import torch

from kvq.kernels.bits import float_planes
from kvq.kernels.spec import SideLayout

Partial = tuple[torch.Tensor, torch.Tensor]


def page_scores(
    q_BKMD: torch.Tensor, words: torch.Tensor, meta: torch.Tensor, layout: SideLayout, scale: float = 1.0
) -> torch.Tensor:
    """Return q . k for every token of the pages, [B, K, M, T], in the dtype of q.

    words [B, K, P, *layout.words_shape], meta [B, K, P, *layout.meta_shape] (fp16), scale: static scale (e4m3).
    """
    B, K, M, _ = q_BKMD.shape
    planes, inverse = _planes(words, layout, q_BKMD.dtype, scale)
    parts, chunks, pages = layout.parts, layout.chunks, words.shape[2]
    if layout.format == "affine" and layout.axis == "channel":
        planes = _scale_channels(planes, meta, inverse, layout)
        inverse = torch.ones_like(inverse)
    unit = _unit(layout)
    subs = layout.width // unit
    query = q_BKMD.view(B, K, M, chunks, subs, unit).permute(3, 4, 0, 1, 2, 5) * inverse.view(parts, chunks, *[1] * 5)
    tiles = planes.view(parts, chunks, B, K, -1, subs, unit).permute(0, 1, 5, 2, 3, 6, 4)
    raw = query @ tiles  # [parts, chunks, subs, B, K, M, P * rows]
    groups = layout.head_dim // layout.group if _folds(layout) else 1
    raw = raw.view(parts, groups, -1, B, K, M, pages, layout.rows).sum(2)
    raw = raw.permute(2, 3, 4, 1, 5, 0, 6).reshape(B, K, M, groups, -1)
    if _folds(layout):
        step, minimum = _token_meta(meta, q_BKMD.dtype)
        total = q_BKMD.view(B, K, M, groups, -1).sum(-1)
        return (raw * step.unsqueeze(2) + total.unsqueeze(-1) * minimum.unsqueeze(2)).sum(3)
    scores = raw.squeeze(3)
    if layout.format == "affine":
        minimum = meta[..., 1].to(q_BKMD.dtype).reshape(B, K, -1, layout.head_dim)
        scores.view(B, K, M, -1, layout.group).add_((q_BKMD @ minimum.transpose(-1, -2)).unsqueeze(-1))
    return scores


def page_weighted_sum(
    p_BKMT: torch.Tensor, words: torch.Tensor, meta: torch.Tensor, layout: SideLayout, scale: float = 1.0
) -> torch.Tensor:
    """Return sum_t p_t v_t, [B, K, M, D], in the dtype of p. Arguments as for ``page_scores``."""
    B, K, M, _ = p_BKMT.shape
    planes, inverse = _planes(words, layout, p_BKMT.dtype, scale)
    parts, chunks, pages = layout.parts, layout.chunks, words.shape[2]
    weights, extra = p_BKMT.unsqueeze(2), 0.0
    if _folds(layout):
        step, minimum = _token_meta(meta, p_BKMT.dtype)
        groups = step.shape[2]
        weights = weights * step.unsqueeze(3)
        extra = (p_BKMT @ minimum.transpose(-1, -2)).unsqueeze(-1)
        extra = extra.expand(B, K, M, groups, layout.group).reshape(B, K, M, -1)
    elif layout.format == "affine":
        planes = _scale_channels(planes, meta, inverse, layout)
        inverse = torch.ones_like(inverse)
        minimum = meta[..., 1].to(p_BKMT.dtype).reshape(B, K, -1, layout.head_dim)
        extra = p_BKMT.view(B, K, M, -1, layout.group).sum(-1) @ minimum
    unit = _unit(layout)
    subs = layout.width // unit
    groups = weights.shape[2]
    repeat = chunks * subs // groups
    weights = weights.view(B, K, groups, M, pages, parts, layout.rows).permute(5, 2, 0, 1, 3, 4, 6)
    weights = weights.reshape(parts, groups, B, K, M, -1).repeat_interleave(repeat, dim=1)
    tiles = planes.view(parts, chunks, B, K, -1, subs, unit).movedim(5, 2)
    out = weights.view(parts, chunks, subs, B, K, M, -1) @ tiles  # [parts, chunks, subs, B, K, M, unit]
    out = (out * inverse.view(parts, chunks, *[1] * 5)).sum(0)
    return out.permute(2, 3, 4, 0, 1, 5).reshape(B, K, M, -1) + extra


def partial_attention(scores: torch.Tensor, weighted_sum) -> Partial:
    """Softmax over one segment: (output [B, K, M, D], log-sum-exp [B, K, M]).

    ``scores`` may hold -inf; a query that sees nothing here gets output 0 and log-sum-exp -inf.
    """
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1))
    return weighted_sum(weights), lse


def merge_partials(partials: list[Partial]) -> torch.Tensor:
    """Merge segment results exactly: softmax over the union of the segments."""
    outputs, lses = zip(*partials)
    if len(partials) == 1:
        return outputs[0]
    share = torch.softmax(torch.stack(lses), dim=0)
    return sum(o * w.unsqueeze(-1) for o, w in zip(outputs, share))


def _folds(layout: SideLayout) -> bool:
    return layout.format == "affine" and layout.axis == "token"


def _unit(layout: SideLayout) -> int:
    """Channels of a plane that share a scale."""
    return math.gcd(layout.width, layout.group) if _folds(layout) else layout.width


def _planes(words, layout, dtype, scale):
    planes, factors = float_planes(words, layout, dtype)
    return planes, scale / torch.tensor(factors, dtype=dtype, device=words.device)


def _token_meta(meta: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and minimum by group and token, each [B, K, groups, T]."""
    B, K, P, tokens, groups, _ = meta.shape
    pairs = meta.to(dtype).permute(5, 0, 1, 4, 2, 3).reshape(2, B, K, groups, P * tokens)
    return pairs[0], pairs[1]


def _scale_channels(planes, meta, inverse, layout):
    """Multiply every code by its channel's scale (and divide by the plane's factor), in place."""
    parts, chunks, width = layout.parts, layout.chunks, layout.width
    B, K, P = meta.shape[:3]
    unit = math.gcd(layout.rows, layout.group)
    step = meta[..., 0].to(planes.dtype).repeat_interleave(layout.group // unit, dim=3)
    step = step.view(B, K, P, parts, layout.rows // unit, 1, chunks, width).permute(3, 6, 0, 1, 2, 4, 5, 7)
    planes.view(parts, chunks, B, K, P, -1, unit, width).mul_(step * inverse.view(parts, chunks, *[1] * 6))
    return planes
