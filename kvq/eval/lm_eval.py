"""lm-eval model ``kvq``: log-likelihoods and generations that read the packed cache.

lm-eval's own Hugging Face model scores with one cache-less forward, which never reads a quantized cache. Here that
forward is a two-view one (``kvq.eval.two_view``), and generation runs on the packed cache.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator
from transformers import PreTrainedModel

from kvq.cache import CachePlan
from kvq.errors import DataError
from kvq.eval.continuations import Question, score_continuations
from kvq.eval.evaluated_model import load_evaluated
from kvq.eval.results_cache import Answers, item_name
from kvq.eval.two_view_attention import Schedule, reads_packed
from kvq.eval.unquantized import fits, rows_of, score_pairs
from kvq.integrations.runtime import running

Request = tuple[tuple[str, str] | None, list[int], list[int]]


class NothingReadError(DataError):
    """Not one scored token would read a quantized one: the score would be that of the unquantized model."""


@register_model("kvq")
class KvqLM(HFLM):
    """A causal model under a plan, for ``lm_eval.simple_evaluate``.

    pretrained   a loaded model (with ``plan`` and ``tokenizer``), or the name of an export, a folder or a hub id (with
                 ``recipe`` and ``stats``).
    mode         what a scored token attends to; in mode prefill the context of a request is the exact prompt, so its
                 first continuation token reads nothing quantized. Generation always reads an exact prompt and then the
                 packed cache.
    answers      answers of an earlier run, used a whole batch at a time, and where new ones are kept. They must be of
                 this model, plan and mode. lm-eval's ``use_cache`` is refused: its keys know nothing of a recipe.
    progress     called with (requests done, requests in all) of the running call; lm-eval's own bars are off.

    A plan that quantizes nothing is scored by lm-eval's own code, to the bit, except that no more than
    ``kvq.eval.lm_head.BLOCK_NUMBERS`` logits are held at once: a longer batch goes through its head in blocks.
    ``packed_share`` says how many of the scored tokens read any quantized token at all.

    Raises NothingReadError for log-likelihood requests none of which would read a quantized token.
    """

    def __init__(
        self,
        pretrained: PreTrainedModel | str,
        *,
        plan: CachePlan | None = None,
        recipe: str | None = None,
        stats: str | None = None,
        mode: str = "stream",
        chunk: int = 512,
        dtype: torch.dtype | str | None = None,
        answers: Answers | None = None,
        progress: Callable[[int, int], None] | None = None,
        **kwargs,
    ):
        Schedule.check(mode, chunk)
        if not isinstance(pretrained, PreTrainedModel):
            evaluated = load_evaluated(pretrained, recipe, stats=stats, dtype=dtype)
            pretrained, plan = evaluated.model, evaluated.plan
            kwargs.setdefault("tokenizer", evaluated.tokenizer)
        super().__init__(pretrained=pretrained, backend="causal", **kwargs)
        self.plan, self.mode, self.chunk, self.answers = plan, mode, chunk, answers
        self._progress = progress or (lambda done, total: None)
        self.scored_tokens = self.packed_reads = 0

    @property
    def packed_share(self) -> float | None:
        """Share of the scored or generated tokens whose query read a quantized token; None before there is any."""
        return self.packed_reads / self.scored_tokens if self.scored_tokens else None

    @property
    def _quantizes(self) -> bool:
        return self.plan is not None and bool(self.plan.layers)

    def set_cache_hook(self, cache_hook) -> None:
        if getattr(cache_hook, "dbdict", None) is not None:
            raise DataError(
                "lm-eval's use_cache knows a request but not the recipe that answered it: leave it out; kvq keeps "
                "answers by recipe (answers=, or 'kvq eval')."
            )
        super().set_cache_hook(cache_hook)

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of every request's continuation, and whether it is the greedy one; in the given order."""
        if self._quantizes:
            return self._through_two_view(requests, override_bs)
        self.scored_tokens += sum(len(continuation) for _, _, continuation in requests)
        size = override_bs or self.batch_size
        if not isinstance(size, int) or self.mixed_precision_dtype is not None:
            # lm-eval looks for a batch size by the memory of whole logits, and its autocast holds around its own code.
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
        batches = _likelihood_batches(requests, size, self.logits_cache)
        names = [item_name("likelihood", context, continuation) for _, context, continuation in requests]
        found = self._kept(names, batches, lambda own: self._plain_batch([requests[i] for i in own]))
        return [(total, greedy) for total, greedy in found]

    def _plain_batch(self, requests: list[Request]) -> list[tuple[float, bool]]:
        """One batch without quantization: by lm-eval's own code where its logits are few, else without holding them."""
        pairs = [(context, continuation) for _, context, continuation in requests]
        rows = [row for row, _ in rows_of(pairs, self.max_length, self.logits_cache)]
        if fits(self.model, rows):
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=len(rows))
        return score_pairs(self.model, pairs, self.max_length, shares=self.logits_cache, dtype=self.softmax_dtype)

    def _through_two_view(self, requests: list[Request], override_bs: int | None) -> list[tuple[float, bool]]:
        """Requests of one context become one question."""
        questions: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            # As lm-eval: the last token is only a target, and what does not fit falls off the left.
            row = (context + continuation)[-(self.max_length + 1) :]
            questions.setdefault(tuple(row[: -len(continuation)]), []).append(i)
        asked = [
            Question(context=context, continuations=tuple(tuple(requests[i][2]) for i in own))
            for context, own in questions.items()
        ]
        # Windows of a rolling likelihood come in portions, of which the first may read nothing.
        if requests and requests[0][0] is not None:
            self._refuse_unread(asked)
        size = override_bs or (self.batch_size if isinstance(self.batch_size, int) else 1)
        scores = score_continuations(
            self.model,
            self.plan,
            asked,
            self.mode,
            chunk=self.chunk,
            batch_size=size,
            answers=self.answers,
            progress=self._progress,
        )
        answers: dict[int, tuple[float, bool]] = {}
        for own, row in zip(questions.values(), scores):
            for i, found in zip(own, row):
                answers[i] = (found.total, found.is_greedy)
                self.scored_tokens += len(found.logprobs)
                self.packed_reads += found.packed
        return [answers[i] for i in range(len(requests))]

    def _refuse_unread(self, questions: Sequence[Question]) -> None:
        longest = 0
        for question in questions:
            context, length = len(question.context), max(len(own) for own in question.continuations)
            total = context + length - 1
            if bool(reads_packed(self.plan, self.mode, total, chunk=self.chunk, context=context)[context - 1 :].any()):
                return
            longest = max(longest, total)
        raise NothingReadError(
            f"no scored token would read a quantized one in mode {self.mode!r}, since the longest request has "
            f"{longest} tokens and recipe {self.plan.recipe.name!r} keeps them exact: add examples to the prompt "
            "(--num-fewshot), or take a task with longer texts."
        )

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Greedy or sampled continuations through the packed cache, in the given order."""
        generate = super().generate_until
        with running(self.model, self.plan):
            if self.answers is None or any(request.args[1].get("do_sample") for request in requests):
                found = generate(requests, disable_tqdm=disable_tqdm)
            else:
                names = [item_name("generation", *request.args) for request in requests]
                batches = _generation_batches(requests, self.batch_size, self.tok_encode)
                found = self._kept(names, batches, lambda own: generate([requests[i] for i in own], disable_tqdm=True))
        for request, text in zip(requests, found):
            self._count_generated(len(self.tok_encode(request.args[0])), len(self.tok_encode(text)))
        return found

    def _count_generated(self, prompt: int, written: int) -> None:
        self.scored_tokens += written
        if self._quantizes and written:
            reads = reads_packed(self.plan, "prefill", prompt + written, context=prompt)
            self.packed_reads += int(reads[prompt - 1 : -1].sum())

    def _kept(self, names: list[str], batches: list[list[int]], compute: Callable[[list[int]], list]) -> list:
        """Answers by batch: kept ones where a batch is whole, so that what is computed has the same neighbours and
        with them the same bits as in a run that was not interrupted."""
        answers = Answers(None, {}) if self.answers is None else self.answers
        found: dict[int, Any] = {}
        for batch in batches:
            found.update(zip(batch, answers.recall([names[i] for i in batch], lambda own=batch: compute(own))))
            self._progress(len(found), len(names))
        return [found[i] for i in range(len(names))]


def _likelihood_batches(requests: list[Request], size: int, shares_logits: bool) -> list[list[int]]:
    """The batches that lm-eval's Hugging Face model makes of requests, as positions in the list."""
    numbered = [(i, context, continuation) for i, (_, context, continuation) in enumerate(requests)]
    rows = [(*context, *continuation[:-1]) for _, context, continuation in numbered]
    collator = Collator(
        numbered,
        sort_fn=lambda own: (-len(own[1]) - len(own[2]), (*own[1], *own[2])),
        group_by="contexts" if shares_logits else None,
        group_fn=lambda own: rows[own[0]],
    )
    members: dict[tuple[int, ...] | int, list[int]] = {}
    for i, row in enumerate(rows):
        members.setdefault(row if shares_logits else i, []).append(i)
    # Of a group it gives one, which answers for all.
    batches = collator.get_batched(n=size)
    return [[i for first, *_ in batch for i in members[rows[first] if shares_logits else first]] for batch in batches]


def _generation_batches(requests: list[Instance], size: int, encode: Callable[[str], list[int]]) -> list[list[int]]:
    """The batches of its ``generate_until``."""
    asked = [request.args for request in requests]
    collator = Collator(
        list(range(len(asked))),
        sort_fn=lambda i: (-len(encode(asked[i][0])), asked[i][0]),
        group_by="gen_kwargs",
        group_fn=lambda i: asked[i][1],
    )
    return list(collator.get_batched(n=size))
