"""How far a recipe's next-token distributions are from the baseline's on the same tokens."""

from collections.abc import Sequence

import torch

from kvq.eval.likelihood import WindowScore
from kvq.eval.perplexity import paired
from kvq.eval.result import DivergenceResult


def divergence(scores: Sequence[WindowScore]) -> DivergenceResult:
    """KL(baseline || recipe) in nats a token, and how often both name the same most likely token.

    Means are over all scored tokens, standard errors over windows.
    """
    kl = torch.cat([score.kl.double() for score in scores])
    mean, error = paired([score.kl.double() for score in scores])
    top1, top1_error = paired([score.agrees.double() for score in scores])
    return DivergenceResult(
        kl=mean,
        kl_stderr=error,
        kl_p99=float(kl.sort().values[max(0, -(-99 * len(kl) // 100) - 1)]),
        kl_max=float(kl.max()),
        top1=top1,
        top1_stderr=top1_error,
        tokens=len(kl),
    )
