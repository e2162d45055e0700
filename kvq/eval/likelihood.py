"""Per-token losses of token windows, and the divergence from a baseline, for any number of plans at once.

The baseline is computed once per window and kept as hidden states (small), so every plan is paired with it on the same
tokens; logits exist for a block of tokens at a time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields

import torch
from transformers import PreTrainedModel

from kvq.cache import CachePlan
from kvq.eval.lm_head import Hidden, blocks, hidden_states, log_probabilities
from kvq.eval.results_cache import packed_tensor, unpacked_tensor
from kvq.eval.two_view import two_view
from kvq.models.decoder import telling


@dataclass(frozen=True, kw_only=True)
class WindowScore:
    """One window under one plan; every tensor has one number per scored token, in order, on the CPU.

    losses, baseline_losses   negative log-likelihood, nats.
    kl, reverse_kl            KL(baseline || plan) and KL(plan || baseline), nats.
    agrees                    bool: both name the same most likely token.
    in_top5                   bool: the baseline's most likely token is among the plan's five.
    """

    losses: torch.Tensor
    baseline_losses: torch.Tensor
    kl: torch.Tensor
    reverse_kl: torch.Tensor
    agrees: torch.Tensor
    in_top5: torch.Tensor

    def to_data(self) -> dict[str, str]:
        return {name: packed_tensor(value) for name, value in vars(self).items()}

    @classmethod
    def of_data(cls, data: Mapping[str, str]) -> "WindowScore":
        return cls(**{name: unpacked_tensor(text) for name, text in data.items()})


@dataclass(frozen=True, kw_only=True)
class Windows:
    """tokens int64 [N, T]; ``first[n]`` is the first scored token of window n, at least 1; ``context``: tokens of the
    exact prompt in mode prefill, else None. positions int64 [N, T]: None counts every window from 0."""

    tokens: torch.Tensor
    first: Sequence[int]
    context: int | None = None
    positions: torch.Tensor | None = None

    @property
    def scored(self) -> int:
        return sum(self.tokens.shape[1] - first for first in self.first)


def score_windows(
    model: PreTrainedModel,
    plans: Mapping[str, CachePlan | None],
    windows: Windows,
    mode: str = "stream",
    *,
    chunk: int = 512,
    batch_size: int = 1,
    baseline: PreTrainedModel | None = None,
    late: Callable[[int], bool] = lambda done: False,
) -> Iterator[dict[str, WindowScore]]:
    """Yield, window by window, the score under every plan (None, or a plan that quantizes nothing: the plain model).

    baseline   another model of the same vocabulary; None takes this model without quantization.
    late       asked before every plan with how many are done; once it is true, the other plans are left out.
    batch_size windows a forward. Each window is given whole; its last token is only read (by papers' convention).

    Raises DataError if a forward gives logits that are NaN or infinite.
    """
    settings = {"chunk": chunk, "contexts": windows.context if mode == "prefill" else None}
    for start in range(0, len(windows.tokens), batch_size):
        batch = windows.tokens[start : start + batch_size]
        positions = None if windows.positions is None else windows.positions[start : start + batch_size]
        with telling(model, len(plans) + (baseline is None), len(batch)):
            plain = hidden_states(baseline or model, batch, positions)
            found = {}
            for name, plan in plans.items():
                if late(len(found)):
                    break
                if baseline is None and not (plan and plan.layers):
                    found[name] = plain
                    continue
                with two_view(model, plan, mode, **settings) if plan else nullcontext():
                    found[name] = hidden_states(model, batch, positions)
        for row in range(len(batch)):
            first = windows.first[start + row]
            yield score_row(baseline or model, model, plain, found, batch[row], row, first, start + row)


def score_row(
    baseline: PreTrainedModel,
    model: PreTrainedModel,
    plain: Hidden,
    found: Mapping[str, Hidden],
    tokens,
    row,
    first,
    number,
) -> dict[str, WindowScore]:
    """Scores of one window's tokens [first, T), read from hidden states of row ``row``."""
    parts: dict[str, list[tuple[torch.Tensor, ...]]] = {name: [] for name in found}
    # Token i is predicted by position i - 1.
    for start, stop in blocks(model, first - 1, len(tokens) - 1):
        targets = tokens[start + 1 : stop + 1].to(model.device).unsqueeze(1)
        where = f" in window {number}, tokens {start} to {stop - 1}"
        base = log_probabilities(baseline, plain, row, start, stop, "the baseline", where)
        base_loss = -base.gather(1, targets).squeeze(1)
        for name, hidden in found.items():
            own = base
            if hidden is not plain:
                own = log_probabilities(model, hidden, row, start, stop, f"recipe {name!r}", where)
            loss = -own.gather(1, targets).squeeze(1)
            parts[name].append((loss, base_loss, *_distances(base, own)))
    names = [field.name for field in fields(WindowScore)]
    return {
        name: WindowScore(**{field: torch.cat(column).cpu() for field, column in zip(names, zip(*rows))})
        for name, rows in parts.items()
    }


def _distances(base: torch.Tensor, own: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """KL both ways, and agreement on the most likely token and on the first five, from log-probabilities [N, V]."""
    gap = base - own
    kl, reverse = (base.exp() * gap).sum(-1).clamp_(min=0), -(own.exp() * gap).sum(-1)
    best = base.argmax(-1, keepdim=True)
    five = own.topk(min(5, own.shape[-1]), dim=-1).indices
    return kl, reverse.clamp_(min=0), (own.argmax(-1, keepdim=True) == best).squeeze(-1), (five == best).any(-1)
