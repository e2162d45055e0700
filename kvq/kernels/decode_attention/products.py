"""Attention over packed pages: the two products, and the exact merge of partial results. Torch reference.

Scale and minimum are folded as far as the algebra allows (quantizer c*s + m, query q, weights p):

    axis token     score_t = s_t * (q . c_t) + m_t * sum(q)          out = sum_t (p_t s_t) c_t + sum_t p_t m_t
    axis channel   codes are scaled in place, the minimum is one dot per token group

so a page is never expanded beyond one tile of planes. A codebook is the same with levels in the place of codes, and may
have no metadata at all. Shapes: B rows, K KV heads, M queries that share a KV head
(group x query tokens), P pages, T = P * page_tokens, D head_dim.
"""

import math

import torch
from torch import Tensor

from kvq.pages.bits import float_tile
from kvq.pages.layout import SideLayout
from kvq.pages.pages import Pages
from kvq.shapes import Float, Shaped, checked

Partial = tuple[torch.Tensor, torch.Tensor]


@checked
def page_scores(
    q_BKMD: Float[Tensor, "B K M D"],
    pages: Pages,
    side: str,
    meta: Shaped[Tensor, "B K P *meta"] | None,
    scale: float = 1.0,
    levels: Float[Tensor, " codes"] | None = None,
) -> Float[Tensor, "B K M T"]:
    """Return q . k for every token of one side of the pages, [B, K, M, T], in the dtype of q.

    meta     (scale, minimum or offset) of every group, [B, K, P, rows, groups or channels, 2]; None for none
    scale    static scale (e4m3)
    levels   book: what the codes name, [2^bits]
    """
    layout = pages.layout.side(side)
    tile, factors = float_tile(pages.words(side), layout, q_BKMD.dtype, levels)
    weight = (scale / factors).view(-1, 1, 1, 1, layout.head_dim)
    if meta is None:
        return _token_order((q_BKMD * weight) @ tile, layout)
    if layout.axis == "channel":
        _scale_channels(tile, meta, factors, layout)
        scores = _token_order(q_BKMD @ tile, layout)
        minimum = meta[..., 1].to(q_BKMD.dtype).flatten(2, 3)
        scores.unflatten(-1, (-1, layout.group)).add_((q_BKMD @ minimum.transpose(-1, -2)).unsqueeze(-1))
        return scores
    groups = (layout.head_dim // layout.group, layout.group)
    query = (q_BKMD * weight).unflatten(-1, groups).transpose(-3, -2)
    raw = _token_order(query @ tile.unflatten(-2, groups), layout)  # [B, K, groups, M, T]
    step, minimum = _token_meta(meta, q_BKMD.dtype)
    total = q_BKMD.unflatten(-1, groups).sum(-1)
    return (raw * step.unsqueeze(3)).sum(2) + total @ minimum


@checked
def page_weighted_sum(
    p_BKMT: Float[Tensor, "B K M T"],
    pages: Pages,
    side: str,
    meta: Shaped[Tensor, "B K P *meta"] | None,
    scale: float = 1.0,
    levels: Float[Tensor, " codes"] | None = None,
) -> Float[Tensor, "B K M D"]:
    """Return sum_t p_t v_t, [B, K, M, D], in the dtype of p. Arguments as for ``page_scores``."""
    layout = pages.layout.side(side)
    tile, factors = float_tile(pages.words(side), layout, p_BKMT.dtype, levels)
    weight = (scale / factors).view(-1, 1, 1, 1, layout.head_dim)
    if meta is None:
        return ((_part_order(p_BKMT, layout) @ tile.transpose(-1, -2)) * weight).sum(0)
    if layout.axis == "channel":
        _scale_channels(tile, meta, factors, layout)
        out = (_part_order(p_BKMT, layout) @ tile.transpose(-1, -2)).sum(0)
        minimum = meta[..., 1].to(p_BKMT.dtype).flatten(2, 3)
        return out + p_BKMT.unflatten(-1, (-1, layout.group)).sum(-1) @ minimum
    step, minimum = _token_meta(meta, p_BKMT.dtype)
    groups = (layout.head_dim // layout.group, layout.group)
    weights = _part_order(p_BKMT.unsqueeze(2) * step.unsqueeze(3), layout)  # [parts, B, K, groups, M, P * rows]
    out = weights @ tile.unflatten(-2, groups).transpose(-1, -2)
    out = (out.transpose(-3, -2).flatten(-2) * weight).sum(0)
    offset = (p_BKMT @ minimum.transpose(-1, -2)).unsqueeze(-1)
    return (out.unflatten(-1, groups) + offset).flatten(-2)


def partial_attention(scores: torch.Tensor, weighted_sum) -> Partial:
    """Softmax over one segment: (output [B, K, M, D], log-sum-exp [B, K, M]).

    ``scores`` may hold -inf; a query that sees nothing here gets output 0 and log-sum-exp -inf.
    """
    if not scores.shape[-1]:
        return weighted_sum(scores), scores.new_full(scores.shape[:-1], -torch.inf)
    top = scores.amax(dim=-1, keepdim=True)
    top = top.masked_fill_(top == -torch.inf, 0.0)
    weights = torch.exp(scores - top)
    total = weights.sum(dim=-1, keepdim=True)
    output = weighted_sum(weights) / total.clamp_min(torch.finfo(total.dtype).tiny)
    return output, (top + total.log()).squeeze(-1)


def merge_partials(partials: list[Partial]) -> torch.Tensor:
    """Merge segment results exactly: softmax over the union of the segments."""
    outputs, lses = zip(*partials)
    if len(partials) == 1:
        return outputs[0]
    share = torch.softmax(torch.stack(lses), dim=0)
    return sum(o * w.unsqueeze(-1) for o, w in zip(outputs, share))


def merged_lse(partials: list[Partial]) -> torch.Tensor:
    """Log-sum-exp [B, K, M] over the union of the segments."""
    return torch.stack([lse for _, lse in partials]).logsumexp(dim=0)


def _token_order(scores: torch.Tensor, layout: SideLayout) -> torch.Tensor:
    """[parts, ..., P * rows] to [..., P * page_tokens]."""
    if layout.parts == 1:
        return scores[0]
    return scores.unflatten(-1, (-1, layout.rows)).movedim(0, -2).flatten(-3)


def _part_order(weights: torch.Tensor, layout: SideLayout) -> torch.Tensor:
    """[..., P * page_tokens] to [parts, ..., P * rows]."""
    if layout.parts == 1:
        return weights.unsqueeze(0)
    return weights.unflatten(-1, (-1, layout.parts, layout.rows)).movedim(-2, 0).flatten(-2)


def _token_meta(meta: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and minimum by group and token, each [B, K, groups, T]."""
    # Contiguous before the cast: everything that follows reads it once per query.
    pairs = meta.permute(5, 0, 1, 4, 2, 3).contiguous().to(dtype).flatten(-2)
    return pairs[0], pairs[1]


def _scale_channels(tile: torch.Tensor, meta: torch.Tensor, factors: torch.Tensor, layout: SideLayout) -> None:
    """Multiply every code by its channel's scale, and take out the field's factor, in place."""
    unit = math.gcd(layout.rows, layout.group)
    step = meta[..., 0].to(tile.dtype).repeat_interleave(layout.group // unit, dim=3)
    step = step.unflatten(3, (layout.parts, -1)).permute(3, 0, 1, 5, 2, 4)  # [parts, B, K, D, P, units]
    step = (step / factors.view(layout.parts, 1, 1, -1, 1, 1)).flatten(-2).unsqueeze(-1)
    tile.unflatten(-1, (-1, unit)).mul_(step)
