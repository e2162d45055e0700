"""Log-likelihoods of continuations of given contexts, as decoding through the packed cache would find them.

Continuations of one context share its computation wherever that changes nothing (``kvq.eval.branches``).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from kvq.cache import CachePlan
from kvq.errors import DataError
from kvq.eval.branches import Branches
from kvq.eval.lm_head import Hidden, blocks, hidden_states, log_probabilities
from kvq.eval.results_cache import Answers, item_name, packed_tensor, unpacked_tensor
from kvq.eval.two_view import two_view
from kvq.eval.two_view_attention import Schedule, can_share, reads_packed
from kvq.models.decoder import telling
from kvq.models.describe import describe

_FORKS: "WeakKeyDictionary[PreTrainedModel, bool]" = WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class Question:
    """One context and continuations of it, as token ids; each at least one token."""

    context: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]

    @property
    def columns(self) -> int:
        """Columns of its row if its continuations share the context; the last token of each is only a target."""
        return len(self.context) + sum(len(own) - 1 for own in self.continuations)


@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """One continuation: log-probability (nats) of each of its tokens, and whether it is the most likely one, [n].

    ``packed``  how many of its tokens were predicted by a query that read at least one quantized token.
    """

    logprobs: torch.Tensor
    greedy: torch.Tensor
    packed: int

    @property
    def total(self) -> float:
        return float(self.logprobs.sum())

    @property
    def is_greedy(self) -> bool:
        """True if greedy decoding would have written exactly this continuation."""
        return bool(self.greedy.all())

    def to_data(self) -> list:
        return [packed_tensor(self.logprobs), packed_tensor(self.greedy), self.packed]

    @classmethod
    def of_data(cls, data: list) -> "TokenScores":
        return cls(logprobs=unpacked_tensor(data[0]), greedy=unpacked_tensor(data[1]), packed=data[2])


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a forward: a question, or one continuation of question ``index`` (its number: ``first``)."""

    index: int
    first: int
    question: Question


def rows_of(questions: Sequence[Question], model, plan: CachePlan | None, mode: str, chunk: int) -> list[Row]:
    """Rows of the questions, in their order; continuations that cannot share their context get a row each."""
    rows = []
    for index, question in enumerate(questions):
        parts = [question]
        if len(question.continuations) > 1 and not _shares(question, model, plan, mode, chunk):
            parts = [Question(context=question.context, continuations=(own,)) for own in question.continuations]
        rows += [Row(index=index, first=first, question=part) for first, part in enumerate(parts)]
    return rows


def score_continuations(
    model: PreTrainedModel,
    plan: CachePlan | None,
    questions: Sequence[Question],
    mode: str = "stream",
    *,
    chunk: int = 512,
    batch_size: int = 1,
    answers: Answers | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[TokenScores]]:
    """Scores of every continuation of every question. ``plan`` None: the model without quantization.

    mode        as ``kvq.eval.two_view_attention``; in mode prefill the context is the exact prompt.
    batch_size  rows a forward. Rows of like length share one, the longest first, so that memory runs out at once or
                never.
    answers     scores that an earlier run left are taken from here, a whole batch at a time so that they are the same
                to the bit, and new ones are kept here.
    progress    called with (continuations done, continuations in all).

    Raises DataError if a forward gives logits that are NaN or infinite.
    """
    for question in questions:
        if not question.context or not question.continuations or not all(question.continuations):
            raise DataError("a question needs a context of one token or more, and continuations that are not empty.")
    answers = Answers(None, {}) if answers is None else answers
    rows = rows_of(questions, model, plan, mode, chunk)
    rows.sort(key=lambda row: -row.question.columns)
    found: list[list[TokenScores | None]] = [[None] * len(question.continuations) for question in questions]
    done, total = 0, sum(len(question.continuations) for question in questions)
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        names = [name for row in batch for name in _names(row.question)]
        kept = answers.recall(
            names, lambda batch=batch: _score([row.question for row in batch], model, plan, mode, chunk)
        )
        scores = [TokenScores.of_data(own) for own in kept]
        done += len(scores)
        for row in batch:
            own, scores = scores[: len(row.question.continuations)], scores[len(row.question.continuations) :]
            found[row.index][row.first : row.first + len(own)] = own
        if progress:
            progress(done, total)
    return found


def _names(question: Question) -> list[str]:
    context = item_name("context", question.context)
    return [item_name("continuation", context, own) for own in question.continuations]


def _score(rows: Sequence[Question], model, plan, mode: str, chunk: int) -> list[list]:
    """Scores of every continuation of one batch, padded on the right, as plain data."""
    lengths = [row.columns for row in rows]
    tokens = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    for b, row in enumerate(rows):
        inputs = [*row.context, *(token for own in row.continuations for token in own[:-1])]
        tokens[b, : len(inputs)] = torch.tensor(inputs)
    contexts = [len(row.context) for row in rows]
    branches = None
    if any(len(row.continuations) > 1 for row in rows):
        branches = Branches.of(contexts, [[len(own) - 1 for own in row.continuations] for row in rows])
    prompts = contexts if mode == "prefill" else None
    view = two_view(model, plan, mode, chunk=chunk, contexts=prompts, lengths=lengths, branches=branches)
    with telling(model, 1, sum(len(row.continuations) for row in rows)), view:
        hidden = hidden_states(model, tokens, None if branches is None else branches.positions)
    scores = (_row_scores(hidden, b, row, model, plan, mode, chunk) for b, row in enumerate(rows))
    return [own.to_data() for row in scores for own in row]


def _row_scores(hidden: Hidden, b: int, row: Question, model, plan, mode: str, chunk: int) -> Iterator[TokenScores]:
    context = len(row.context)
    firsts = accumulate((len(own) - 1 for own in row.continuations), initial=context)
    longest = context + max(len(own) for own in row.continuations) - 1
    reads = reads_packed(plan, mode, longest, chunk=chunk, context=context) if plan is not None else None
    who = f"recipe {plan.recipe.name!r}" if plan is not None and plan.layers else "the model"
    for own, first in zip(row.continuations, firsts):
        # Its first token is predicted by the last of the context.
        columns = torch.tensor([context - 1, *range(first, first + len(own) - 1)], device=hidden.states.device)
        states = Hidden(states=hidden.states[b : b + 1, columns], kind=hidden.kind)
        targets = torch.tensor(own, device=model.device)
        parts = []
        for start, stop in blocks(model, 0, len(own)):
            scores, wanted = log_probabilities(model, states, 0, start, stop, who), targets[start:stop]
            parts.append((scores.gather(1, wanted.unsqueeze(1)).squeeze(1), scores.argmax(-1) == wanted))
        logprobs, greedy = (torch.cat(column).cpu() for column in zip(*parts))
        packed = 0 if reads is None else int(reads[context - 1 : context - 1 + len(own)].sum())
        yield TokenScores(logprobs=logprobs, greedy=greedy, packed=packed)


def _shares(question: Question, model, plan: CachePlan | None, mode: str, chunk: int) -> bool:
    context, longest = len(question.context), max(len(own) for own in question.continuations) - 1
    if longest == 0:
        return True
    if plan is not None and plan.layers:
        contexts = torch.tensor([context]) if mode == "prefill" else None
        if not can_share(plan, Schedule(mode=mode, chunk=chunk, contexts=contexts), context, longest):
            return False
    return can_fork(model)


def can_fork(model: PreTrainedModel) -> bool:
    """True if rows of this model may hold several continuations; tried once a model, on a few tokens."""
    if model not in _FORKS:
        _FORKS[model] = _try_fork(model)
    return _FORKS[model]


def _try_fork(model: PreTrainedModel) -> bool:
    """A model whose layers all see the whole past, and whose positions follow ``position_ids``."""
    spec = describe(model.config)
    if len(spec.full_layers) < len(spec.layers):
        return False
    ids = [(7 * i + 3) % spec.vocab_size for i in range(14)]
    context, (one, other) = ids[:6], (ids[6:10], ids[10:])
    branches = Branches.of([6], [[len(one), len(other)]])
    with two_view(model, None, branches=branches):
        together = hidden_states(model, torch.tensor([ids]), branches.positions).states[0]
    alone = hidden_states(model, torch.tensor([context + other])).states[0, 6:]
    distance = (together[10:] - alone).float().norm() / alone.float().norm()
    return bool(distance < 100 * torch.finfo(model.dtype).eps ** 0.75)
