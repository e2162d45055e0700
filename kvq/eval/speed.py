"""Decoding speed through the packed cache beside an ordinary one, in turns, so that the machine's pace meets both."""

import statistics
import time
from collections.abc import Sequence

import torch
from transformers import DynamicCache, PreTrainedModel

from kvq.cache import CachePlan, implementations
from kvq.eval.result import SpeedResult
from kvq.integrations.runtime import new_cache, running
from kvq.models.describe import text_config

CONTEXT, TURNS, TOKENS = 2048, 5, 8


def decode_speed(model: PreTrainedModel, plan: CachePlan, filler: Sequence[int], longest: int) -> SpeedResult:
    """Tokens a second after a prompt of up to 2,048 tokens, batch 1: median over turns of 8 tokens.

    The first turn of each, which compiles and warms up, is not counted.
    """
    context = min(CONTEXT, longest - (TURNS + 1) * TOKENS)
    prompt = torch.tensor([[filler[i % len(filler)] for i in range(context)]], device=model.device)
    with running(model, plan), torch.inference_mode():
        packed = new_cache(model) if plan.layers else DynamicCache(config=text_config(model.config))
        plain = DynamicCache(config=text_config(model.config))
        for cache in (packed, plain):
            model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        speeds = [(_turn(model, packed), _turn(model, plain)) for _ in range(TURNS + 1)][1:]
    ratios = [own / other for own, other in speeds]
    return SpeedResult(
        context=context,
        tokens_per_second=statistics.median(own for own, _ in speeds),
        baseline=statistics.median(other for _, other in speeds),
        ratio=statistics.median(ratios),
        ratio_low=min(ratios),
        ratio_high=max(ratios),
        turns=TURNS,
        threads=torch.get_num_threads(),
        implementation=" and ".join(implementations(packed)) if plan.layers else "ordinary cache",
    )


def _turn(model: PreTrainedModel, cache) -> float:
    token = torch.full((1, 1), 3, device=model.device)
    start = time.perf_counter()
    for _ in range(TOKENS):
        logits = model(token, past_key_values=cache, use_cache=True).logits
        token = logits[:, -1:].argmax(-1)
    # Reading the token back waits for the device.
    int(token)
    return TOKENS / (time.perf_counter() - start)
