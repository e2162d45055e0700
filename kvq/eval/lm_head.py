"""Run a causal model in two halves: the decoder once, and its head on a few tokens at a time.

The logits of a long text are never held: 8,192 tokens of a vocabulary of 256,000 take 8 GB in float32.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from kvq.errors import DataError
from kvq.models.decoder import decoder_of

# Logits held at once.
BLOCK_NUMBERS = 1 << 24


@dataclass(frozen=True, kw_only=True)
class Hidden:
    """What the head reads: ``states`` [B, T, hidden], and the type of the decoder's output."""

    states: torch.Tensor
    kind: type


def hidden_states(model: PreTrainedModel, tokens: torch.Tensor, positions: torch.Tensor | None = None) -> Hidden:
    """Run the decoder over tokens [B, T] without a cache and without gradients. positions [B, T]: None counts up."""
    extra = {} if positions is None else {"position_ids": positions.to(model.device)}
    with torch.inference_mode():
        output = decoder_of(model)(input_ids=tokens.to(model.device), use_cache=False, **extra)
    return Hidden(states=output.last_hidden_state, kind=type(output))


def logits_of(model: PreTrainedModel, hidden: Hidden, row: int, start: int, stop: int) -> torch.Tensor:
    """Logits [stop - start, V] of one row's tokens, with all that the model does after its decoder (softcap, scale)."""
    decoder, block = decoder_of(model), hidden.states[row : row + 1, start:stop]
    held = decoder.__dict__.get("forward")
    decoder.forward = lambda *args, **kwargs: hidden.kind(last_hidden_state=block)
    try:
        with torch.inference_mode():
            dummy = torch.zeros(1, stop - start, dtype=torch.long, device=model.device)
            return model(input_ids=dummy, use_cache=False).logits[0]
    finally:
        # Another library (accelerate) may have put its own forward there.
        del decoder.forward
        if held is not None:
            decoder.forward = held


def log_probabilities(
    model: PreTrainedModel, hidden: Hidden, row: int, start: int, stop: int, who: str, where: str = ""
) -> torch.Tensor:
    """Log-softmax [stop - start, V] of one row's logits, in float32 or float64.

    Raises DataError, naming ``who`` and ``where``, if they are NaN or infinite.
    """
    logits = logits_of(model, hidden, row, start, stop)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if not bool(logits.isfinite().all()):
        raise DataError(
            f"{who} gives logits that are NaN or infinite{where}: run the model in float32 or bfloat16, or check its "
            "weights."
        )
    return torch.log_softmax(logits, dim=-1)


def blocks(model: PreTrainedModel, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Cut tokens [start, stop) so that a block's logits stay within the budget."""
    step = max(1, BLOCK_NUMBERS // vocabulary(model))
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


def vocabulary(model: PreTrainedModel) -> int:
    return model.config.get_text_config().vocab_size
