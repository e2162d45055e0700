"""lm-eval model ``kvq``: log-likelihoods and generations that read the packed cache.

lm-eval's own Hugging Face model scores with one cache-less forward, which never reads a quantized cache. Here that
forward is a two-view one (``kvq.integrations.two_view``), and generation runs on the packed cache.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel

from kvq.cache import CachePlan
from kvq.cache.two_view import Schedule, reads_packed
from kvq.errors import DataError
from kvq.integrations.head import Hidden, blocks, hidden_states, logits_of
from kvq.integrations.runtime import install, uninstall
from kvq.integrations.subject import load_subject
from kvq.integrations.two_view import two_view

Request = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("kvq")
class KvqLM(HFLM):
    """A causal model under a plan, for ``lm_eval.simple_evaluate``.

    pretrained   a loaded model (with ``plan`` and ``tokenizer``), or the name of an export, a folder or a hub id (with
                 ``recipe`` and ``stats``).
    mode         what a scored token attends to; in mode prefill the context of a request is the exact prompt, so its
                 first continuation token reads nothing quantized.

    A plan that quantizes nothing is scored by lm-eval's own code, to the bit. ``packed_share`` says how many of the
    scored tokens read any quantized token at all.
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
        **kwargs,
    ):
        Schedule(mode=mode, chunk=chunk, contexts=torch.zeros(1) if mode == "prefill" else None)
        if not isinstance(pretrained, PreTrainedModel):
            subject = load_subject(pretrained, recipe, stats=stats, dtype=dtype)
            pretrained, plan = subject.model, subject.plan
            kwargs.setdefault("tokenizer", subject.tokenizer)
        super().__init__(pretrained=pretrained, backend="causal", **kwargs)
        self.plan, self.mode, self.chunk = plan, mode, chunk
        self.scored_tokens = self.packed_reads = 0

    @property
    def packed_share(self) -> float | None:
        """Share of the scored continuation tokens whose query read a quantized token; None before any is scored."""
        return self.packed_reads / self.scored_tokens if self.scored_tokens else None

    @property
    def _quantizes(self) -> bool:
        return self.plan is not None and bool(self.plan.layers)

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of every request's continuation, and whether it is the greedy one; in the given order."""
        if not self._quantizes:
            self.scored_tokens += sum(len(continuation) for _, _, continuation in requests)
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
        size = override_bs or (self.batch_size if isinstance(self.batch_size, int) else 1)
        # Rows of like length share a batch, the longest first so that memory runs out at once or never.
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        answers: dict[int, tuple[float, bool]] = {}
        for start in range(0, len(order), size):
            own = order[start : start + size]
            for i, answer in zip(own, self._score([requests[i] for i in own])):
                answers[i] = answer
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)
        return [answers[i] for i in range(len(requests))]

    def _score(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """One batch, padded on the right."""
        rows, contexts = [], []
        for _, context, continuation in requests:
            # As lm-eval: the last token is only a target, and what does not fit falls off the left.
            row = (context + continuation)[-(self.max_length + 1) :][:-1]
            rows.append(row)
            contexts.append(len(row) + 1 - len(continuation))
        lengths = [len(row) for row in rows]
        tokens = torch.zeros(len(rows), max(lengths), dtype=torch.long)
        for b, row in enumerate(rows):
            tokens[b, : len(row)] = torch.tensor(row)
        prompts = contexts if self.mode == "prefill" else None
        with two_view(self.model, self.plan, self.mode, chunk=self.chunk, contexts=prompts, lengths=lengths):
            hidden = hidden_states(self.model, tokens)
        self._count_reads(contexts, lengths)
        return [self._answer(hidden, b, contexts[b], requests[b][2]) for b in range(len(rows))]

    def _answer(self, hidden: Hidden, row: int, context: int, continuation: list[int]) -> tuple[float, bool]:
        targets = torch.tensor(continuation, device=self.model.device)
        total, greedy = 0.0, True
        first = context - 1
        for start, stop in blocks(first, first + len(targets), self.vocab_size):
            logits = torch.log_softmax(
                logits_of(self.model, hidden, row, start, stop), dim=-1, dtype=self.softmax_dtype
            )
            if not bool(logits.isfinite().all()):
                raise DataError(
                    f"recipe {self.plan.recipe.name!r} gives logits that are NaN or infinite: run the model in float32 "
                    "or bfloat16, or check its weights."
                )
            own = targets[start - first : stop - first]
            total += float(logits.gather(1, own.unsqueeze(1)).sum())
            greedy &= bool((logits.argmax(-1) == own).all())
        return total, greedy

    def _count_reads(self, contexts: list[int], lengths: list[int]) -> None:
        for context, length in zip(contexts, lengths):
            reads = reads_packed(self.plan, self.mode, length, chunk=self.chunk, context=context)
            self.scored_tokens += length - (context - 1)
            self.packed_reads += int(reads[context - 1 :].sum())

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        with _cache_of(self.model, self.plan):
            return super().generate_until(requests, disable_tqdm=disable_tqdm)


@contextmanager
def _cache_of(model: PreTrainedModel, plan: CachePlan | None) -> Iterator[None]:
    """Run ``model`` on exactly this plan's cache, whatever is installed on it, and put that back afterwards."""
    runtime = getattr(model, "kvq", None)
    if runtime is not None and runtime.plan is plan:
        yield
        return
    if runtime is not None:
        uninstall(model)
    try:
        if plan is not None and plan.layers:
            install(model, plan)
        yield
    finally:
        if getattr(model, "kvq", None) is not None:
            uninstall(model)
        if runtime is not None:
            install(model, runtime.plan)
