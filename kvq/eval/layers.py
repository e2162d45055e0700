"""The error that each layer's attention takes from its quantized keys and values, by itself."""

import torch
from transformers import PreTrainedModel

from kvq.cache import CachePlan
from kvq.eval.lm_head import hidden_states
from kvq.eval.result import LayerRow
from kvq.eval.two_view import two_view


def layer_errors(
    model: PreTrainedModel,
    plan: CachePlan,
    tokens: torch.Tensor,
    mode: str,
    *,
    chunk: int = 512,
    context: int | None = None,
) -> tuple[LayerRow, ...]:
    """|output - exact output| / |exact output| of attention in every planned layer, over one window of tokens [T].

    Both outputs are of the same input, the one that the quantized layers below leave, so that a layer is not blamed for
    what came before it. ``context``: tokens of the exact prompt, mode prefill.
    """
    rows: list[LayerRow] = []

    def watch(layer: int, found: torch.Tensor, exact: torch.Tensor) -> None:
        gap = (found.double() - exact.double()).square().sum(dim=(0, 1, 3))
        size = exact.double().square().sum(dim=(0, 1, 3))
        heads = (gap / size.clamp(min=torch.finfo(torch.float64).tiny)).sqrt()
        total = (gap.sum() / size.sum().clamp(min=torch.finfo(torch.float64).tiny)).sqrt()
        rows.append(LayerRow(layer=layer, error=float(total), heads=[float(head) for head in heads]))

    with two_view(model, plan, mode, chunk=chunk, contexts=context if mode == "prefill" else None, watch=watch):
        hidden_states(model, tokens.unsqueeze(0))
    return tuple(rows)
