"""How far next-token distributions, and the output of each layer, are from the baseline's on the same tokens."""

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from kvq.cache import CachePlan
from kvq.eval.likelihood import Windows, WindowScore
from kvq.eval.lm_head import hidden_states
from kvq.eval.perplexity import paired
from kvq.eval.result import DivergenceResult, LayerRow, PositionRow, WorstToken
from kvq.eval.two_view import two_view

# Tokens of context that are shown before the worst token.
SHOWN = 12


def divergence(
    scores: Sequence[WindowScore],
    windows: Windows | None = None,
    reads: torch.Tensor | None = None,
    layers: Sequence[LayerRow] = (),
    decode: Callable[[list[int]], str] | None = None,
) -> DivergenceResult:
    """KL both ways in nats a token, and agreement on the most likely tokens.

    Means are over all scored tokens, standard errors over windows. ``windows`` (of which ``scores`` are the first)
    gives the places of tokens, ``reads`` [T] says which positions read quantized tokens, ``decode`` turns ids to text.
    """
    kl = torch.cat([score.kl.double() for score in scores])
    fields = {}
    for name, column in (("kl", "kl"), ("reverse_kl", "reverse_kl"), ("top1", "agrees"), ("top5", "in_top5")):
        mean = paired([getattr(score, column).double() for score in scores])
        fields |= {name: mean.value, f"{name}_stderr": mean.stderr}
    return DivergenceResult(
        **fields,
        kl_p99=float(kl.sort().values[max(0, -(-99 * len(kl) // 100) - 1)]),
        kl_max=float(kl.max()),
        windows=len(scores),
        tokens=len(kl),
        worst=_worst(scores, windows, decode) if windows is not None and decode else None,
        positions=_by_position(scores, windows, reads) if windows is not None and reads is not None else (),
        layers=tuple(layers),
    )


def _worst(scores: Sequence[WindowScore], windows: Windows, decode: Callable[[list[int]], str]) -> WorstToken:
    peaks = [float(score.kl.max()) for score in scores]
    window = max(range(len(peaks)), key=peaks.__getitem__)
    position = windows.first[window] + int(scores[window].kl.argmax())
    tokens = windows.tokens[window].tolist()
    return WorstToken(
        window=window,
        position=position,
        kl=peaks[window],
        before=decode(tokens[max(0, position - SHOWN) : position]),
        token=decode([tokens[position]]),
    )


def _by_position(scores: Sequence[WindowScore], windows: Windows, reads: torch.Tensor) -> tuple[PositionRow, ...]:
    """Buckets that double in width: 1-63, 64-127, 128-255, ..."""
    length, rows, low = windows.tokens.shape[1], [], 1
    high = 64
    while low < length:
        high = min(high, length)
        parts = []
        for score, first in zip(scores, windows.first):
            start, stop = max(low, first) - first, high - first
            if stop > start >= 0:
                parts.append((score.kl[start:stop].double(), score.agrees[start:stop].double()))
        if parts:
            mean = paired([kl for kl, _ in parts])
            rows.append(
                PositionRow(
                    first=low,
                    last=high - 1,
                    tokens=sum(len(kl) for kl, _ in parts),
                    # Token i is predicted by the query at i - 1.
                    cached=float(reads[low - 1 : high - 1].double().mean()),
                    kl=mean.value,
                    kl_stderr=mean.stderr,
                    top1=float(torch.cat([agrees for _, agrees in parts]).mean()),
                )
            )
        low, high = high, 2 * high
    return tuple(rows)


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
