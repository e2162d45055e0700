"""Greedy text of a model without quantization, kept as other answers are."""

from collections.abc import Sequence

import torch
from transformers import DynamicCache, PreTrainedModel

from kvq.eval.results_cache import Answers, item_name
from kvq.models.describe import text_config


def greedy_continuations(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], tokens: int, *, batch_size: int, answers: Answers
) -> list[tuple[int, ...]]:
    """``tokens`` greedy tokens after each prompt, past any end of text. Prompts of a batch must be of one length.

    An ordinary cache is used, whatever is installed on the model.
    """
    found: list[tuple[int, ...]] = []
    for start in range(0, len(prompts), batch_size):
        own = prompts[start : start + batch_size]
        names = [item_name("greedy", list(prompt), tokens) for prompt in own]
        ids = torch.tensor([list(prompt) for prompt in own])
        kept = answers.recall(names, lambda ids=ids: _decode(model, ids, tokens).tolist())
        found += [tuple(row) for row in kept]
    return found


def _decode(model: PreTrainedModel, prompts: torch.Tensor, tokens: int) -> torch.Tensor:
    """[B, T] to [B, tokens]."""
    cache, token, written = DynamicCache(config=text_config(model.config)), prompts.to(model.device), []
    with torch.inference_mode():
        for _ in range(tokens):
            logits = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            token = logits[:, -1:].argmax(-1)
            written.append(token)
    return torch.cat(written, dim=1).cpu()
