"""Perplexity over windows of a text.

The text is tokenised once and cut into windows of ``seq_len`` tokens, ``stride`` tokens apart. Every window is scored
on its own, its first token unscored. The value is exp of the mean loss over all scored tokens; without overlap all
windows count the same number of tokens, so this is exp of the mean of the windows' mean losses, the convention of GPTQ
and KVQuant. With ``stride < seq_len`` only the tokens that no earlier window scored count. In mode prefill the first
half of a window is its prompt, and only the second half is scored.
"""

import math
from collections.abc import Sequence

import torch

from kvq.errors import DataError
from kvq.eval.likelihood import Windows, WindowScore
from kvq.eval.paired import Difference, verdict
from kvq.eval.result import PerplexityResult


def cut_windows(
    ids: Sequence[int], seq_len: int, stride: int | None = None, limit: int | None = None, mode: str = "stream"
) -> Windows:
    """Cut whole windows out of token ids; tokens that fill no window are left out. ``limit``: at most so many windows.

    Raises DataError if the text fills no window, or for a stride beyond the window.
    """
    stride = seq_len if stride is None else stride
    if seq_len < 2:
        raise DataError(f"seq_len={seq_len} leaves no token to score: use 2 or more.")
    if not 1 <= stride <= seq_len:
        raise DataError(f"stride={stride} skips tokens or does not move: use 1 to seq_len={seq_len}.")
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit} leaves no window: use 1 or more.")
    if len(ids) < seq_len:
        raise DataError(f"the text has {len(ids):,} tokens and seq_len={seq_len}: use shorter windows, or more text.")
    starts = range(0, len(ids) - seq_len + 1, stride)[:limit]
    context = seq_len // 2 if mode == "prefill" else None
    first = [max(1 if start == 0 else seq_len - stride, context or 1, 1) for start in starts]
    tokens = torch.tensor([ids[start : start + seq_len] for start in starts], dtype=torch.long)
    return Windows(tokens=tokens, first=first, context=context)


def perplexity(scores: Sequence[WindowScore]) -> PerplexityResult:
    """Perplexity of the scored windows, the baseline's on the same tokens, and their paired difference."""
    losses, base = (torch.cat([getattr(s, name).double() for s in scores]) for name in ("losses", "baseline_losses"))
    difference = paired([s.losses.double() - s.baseline_losses.double() for s in scores])
    low, high = difference.bounds
    return PerplexityResult(
        value=_exp(float(losses.mean())),
        baseline=_exp(float(base.mean())),
        delta_nll=difference.value,
        delta_nll_stderr=difference.stderr,
        low=low,
        high=high,
        verdict=verdict(difference, higher_is_better=False),
        windows=len(scores),
        tokens=len(losses),
    )


def paired(columns: Sequence[torch.Tensor]) -> Difference:
    """Mean over all tokens, and the standard error over windows (tokens of a window are not independent)."""
    error = None
    if len(columns) > 1:
        error = float(torch.stack([column.mean() for column in columns]).std() / math.sqrt(len(columns)))
    tokens = torch.cat(list(columns))
    return Difference(value=float(tokens.mean()), stderr=error, units=len(columns), identical=not bool(tokens.any()))


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
