"""A batch of lm-eval's log-likelihood requests on a model as it is, without the logits of whole documents.

lm-eval's own code computes the logits of every token of a batch, and their log-softmax beside them: for 8,192 tokens
and a vocabulary of 49,152 that is 3.2 GB. Here the decoder runs on the same padded batch, and its head on the scored
tokens only, a block at a time.
"""

from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel

from kvq.eval import lm_head
from kvq.eval.lm_head import Hidden, hidden_states, logits_of

# A matrix product with few rows may add in another order than one with many, which changes its last bits. A block
# takes unscored rows in, to have at least this many: it then has the bits that the whole batch would have.
FEWEST_ROWS = 64

# Token ids of a context, and of what continues it.
Pair = tuple[Sequence[int], Sequence[int]]


def rows_of(pairs: Sequence[Pair], max_length: int, shares: bool) -> list[tuple[tuple[int, ...], list[int]]]:
    """The rows of a batch as lm-eval's Hugging Face model makes them, each with the pairs that it answers: the last
    token is only a target, what does not fit falls off the left, and with ``shares`` equal rows are one."""
    rows = [tuple((*context, *continuation)[-(max_length + 1) : -1]) for context, continuation in pairs]
    if not shares:
        return [(row, [i]) for i, row in enumerate(rows)]
    found: dict[tuple[int, ...], list[int]] = {}
    for i, row in enumerate(rows):
        found.setdefault(row, []).append(i)
    return list(found.items())


def fits(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> bool:
    """True if the logits of all tokens of a padded batch may be held at once."""
    return len(rows) * max(map(len, rows)) * lm_head.vocabulary(model) <= lm_head.BLOCK_NUMBERS


def score_pairs(
    model: PreTrainedModel, pairs: Sequence[Pair], max_length: int, *, shares: bool, dtype: torch.dtype | None = None
) -> list[tuple[float, bool]]:
    """Log-likelihood (nats) of every pair's continuation, and whether it is the greedy one; one forward for all.

    shares   pairs of one row share it.
    dtype    of the log-softmax; None: the logits' own.
    """
    rows = rows_of(pairs, max_length, shares)
    tokens = torch.zeros(len(rows), max(len(row) for row, _ in rows), dtype=torch.long)
    for b, (row, _) in enumerate(rows):
        tokens[b, : len(row)] = torch.tensor(row)
    hidden = hidden_states(model, tokens)
    # All tokens of the batch in one line, so that a block can take in those of a neighbour.
    line = Hidden(states=hidden.states.flatten(0, 1).unsqueeze(0), kind=hidden.kind)
    found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    for b, (row, members) in enumerate(rows):
        stop = b * tokens.shape[1] + len(row)
        targets = [torch.tensor(pairs[i][1], device=model.device) for i in members]
        for i, own in zip(members, _scores(model, line, stop, targets, dtype)):
            found[i] = own
    return found


def _scores(model, line: Hidden, stop: int, targets: Sequence[torch.Tensor], dtype) -> Iterator[tuple[float, bool]]:
    """Scores of target tokens, each list of which ends at the token that ``stop - 1`` predicts."""
    longest = max(map(len, targets))
    logprobs: list[list[torch.Tensor]] = [[] for _ in targets]
    greedy: list[list[torch.Tensor]] = [[] for _ in targets]
    for first, last in lm_head.blocks(model, stop - longest, stop):
        logits = _block(model, line, first, last)
        best, scores = logits.argmax(-1), torch.log_softmax(logits, dim=-1, dtype=dtype)
        for place, own in enumerate(targets):
            begin = max(first, stop - len(own))
            if begin >= last:
                continue
            wanted = own[begin - stop + len(own) : last - stop + len(own)]
            logprobs[place].append(scores[begin - first :].gather(1, wanted.unsqueeze(1)).squeeze(1))
            greedy[place].append(best[begin - first :] == wanted)
    for own, hits in zip(logprobs, greedy):
        yield float(torch.cat(own).sum()), bool(torch.cat(hits).all())


def _block(model, line: Hidden, first: int, last: int) -> torch.Tensor:
    """Logits [last - first, V] of the tokens [first, last) of a line, computed among neighbours where they are few."""
    total = line.states.shape[1]
    begin = max(0, min(first, last - FEWEST_ROWS))
    end = min(total, max(last, begin + FEWEST_ROWS))
    return logits_of(model, line, 0, begin, end)[first - begin : last - begin]
