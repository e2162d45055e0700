"""Error of attention that a recipe would cause in one layer, before anything is quantized.

The measure is the relative squared error of the attention output,

    e^2 = sum |o' - o|^2 / sum |o|^2

with keys and values as the recipe would store them, first and last tokens exact as it says. With real tokens it is
computed. With drawn tokens there is no real attention, and it is estimated from what causes it:

    E = KEY_WEIGHT w n^2 + VALUE_WEIGHT w r^2,     n^2 = (1 - a) n_t^2 + a (1 - a) n_0^2,     e^2 = E / (1 + E / 2)

n_t^2 and n_0^2 are the variances of the scaled logits' error at ordinary tokens and at the first token, which gets the
share a of attention; r is the relative error of values; w = 1 - RECENT min(1, window / 128) is what errors come down to
where the last tokens stay exact. The weights were fitted on SmolLM2-135M-Instruct by ``benchmarks/diagnosis.py``, whose
results show how well the estimate holds.
"""

import torch

from kvq.cache.plan import HeadGroup
from kvq.diagnosis.sample_tokens import LayerTokens
from kvq.pages.layout import SIDES

KEY_WEIGHT = 0.25
VALUE_WEIGHT = 0.52
RECENT = 0.6


def attention_error(groups: tuple[HeadGroup, ...], tokens: LayerTokens, sides: tuple[str, ...] = SIDES) -> float:
    """e^2 of a layer stored as ``groups`` say, of the sides named; 0 for a layer that stays exact."""
    if not groups:
        return 0.0
    key, value = tokens.key.clone(), tokens.value.clone()
    for group in groups:
        own = list(group.heads)
        for side, x in (("key", key), ("value", value)):
            if side in sides:
                x[:, own] = stored(group, side, x[:, own], tokens.positions)
    if tokens.is_real:
        exact = tokens.output
        found = tokens.output_with(key, value, {side: exact_places(groups, side, tokens) for side in SIDES})
        return float((found - exact).square().sum() / exact.square().sum())
    return _estimated(key, value, tokens, min(group.rules["value"].longest_tail for group in groups))


def exact_places(groups: tuple[HeadGroup, ...], side: str, tokens: LayerTokens) -> torch.Tensor:
    """Whether a probe's query reads a token exactly, bool [K, P, T]."""
    place = torch.arange(tokens.key.shape[2])
    exact = torch.zeros(tokens.key.shape[1], len(tokens.probes), len(place), dtype=torch.bool)
    for group in groups:
        seen = torch.tensor([group.rules[side].seen(position) for position in tokens.probes.tolist()])
        exact[list(group.heads)] = (place < group.sinks) | (place >= group.sinks + seen[:, None])
    return exact


def stored(group: HeadGroup, side: str, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """What the cache would give back for x [W, K, T, D] once all but the sinks is quantized.

    Tokens that fill no whole block stay exact.
    """
    codec, chain = group.codecs[side], group.chains[side]
    written = chain.forward(x)
    whole = (x.shape[2] - group.sinks) // codec.block_tokens * codec.block_tokens
    place = slice(group.sinks, group.sinks + whole)
    body = written[:, :, place]
    if not body.shape[2]:
        return x.clone()
    found, own = written.clone(), positions[:, place]
    # A window at a time, as the cache stores it.
    found[:, :, place] = torch.cat([group.round_trip(side, row, own, x.dtype) for row in body.split(1)])
    return chain.inverse(found)


def _estimated(key: torch.Tensor, value: torch.Tensor, tokens: LayerTokens, window: int) -> float:
    error = key - tokens.key
    # What all tokens share changes no softmax.
    error = error - error[:, :, 1:].mean(2, keepdim=True)
    noise = tokens.scaling**2 * ((error @ tokens.energy) * error).sum(-1).mean(0)  # [K, T]
    first = tokens.first
    logits = (1 - first) * noise[:, 1:].mean(1) + first * (1 - first) * noise[:, 0]
    lost = (value - tokens.value)[:, :, 1:].square().sum((0, 2, 3)) / tokens.value[:, :, 1:].square().sum((0, 2, 3))
    small = (KEY_WEIGHT * logits + VALUE_WEIGHT * lost).mean() * (1 - RECENT * min(1, window / 128))
    # An output that has nothing to do with the right one, and is as long, is off by sqrt(2).
    return float(small / (1 + small / 2))
