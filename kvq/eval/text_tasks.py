"""Tasks on a text: its windows, scored under any number of plans, and what was found in earlier runs."""

import hashlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvq.cache import CachePlan
from kvq.calib.data import SEPARATOR, load_texts, source_name, tokenizer_hash
from kvq.errors import DataError
from kvq.eval.divergence import divergence, layer_errors
from kvq.eval.likelihood import Windows, WindowScore, score_windows
from kvq.eval.perplexity import cut_windows, perplexity
from kvq.eval.result import DivergenceResult, LayerRow, PerplexityResult
from kvq.eval.results_cache import Answers, item_name
from kvq.eval.settings import Settings
from kvq.eval.two_view_attention import reads_packed


def text_ids(
    tokenizer: PreTrainedTokenizerBase, data: str | Path, texts: Sequence[str] | None = None
) -> tuple[list[int], dict[str, Any]]:
    """Token ids of the evaluation part of a source, tokenised once without special tokens, and what the text is.

    texts   of the source, if they are at hand.
    """
    text = SEPARATOR.join(texts or load_texts(data, part="evaluation"))
    # verbose=False: a text longer than the model's context is the rule here, not a mistake.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids, {
        "source": source_name(data),
        "sha256": hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(),
        "tokenizer_sha256": tokenizer_hash(tokenizer),
        "tokens": len(ids),
    }


@dataclass
class TextScores:
    """What one plan got: scores of the first windows, and the error of each layer."""

    scores: list[WindowScore] = field(default_factory=list)
    layers: tuple[LayerRow, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Text:
    """The scored text: its windows, what it is, and how its tokens are taken to arrive."""

    windows: Windows
    identity: Mapping[str, Any]
    mode: str
    chunk: int

    @classmethod
    def load(cls, tokenizer: PreTrainedTokenizerBase, settings: Settings, seq_len: int) -> "Text":
        ids, identity = text_ids(tokenizer, settings.data)
        windows = cut_windows(ids, seq_len, settings.stride, settings.limit, settings.mode)
        return cls(windows=windows, identity=identity, mode=settings.mode, chunk=settings.chunk)

    def reads(self, plan: CachePlan) -> torch.Tensor:
        """bool [T]: the query at this position of a window reads a quantized token."""
        length, context = self.windows.tokens.shape[1], self.windows.context
        return reads_packed(plan, self.mode, length, chunk=self.chunk, context=context)

    def packed_share(self, plan: CachePlan, windows: int | None = None) -> float:
        """Share of the scored tokens (of the first ``windows`` windows) whose query reads a quantized token."""
        reads, length = self.reads(plan), self.windows.tokens.shape[1]
        # Token i is predicted by the query at i - 1.
        counts = [(int(reads[first - 1 : -1].sum()), length - first) for first in self.windows.first[:windows]]
        return sum(read for read, _ in counts) / sum(scored for _, scored in counts)

    def refuse_unread(self, plan: CachePlan) -> None:
        """Raise DataError if no scored token would read a quantized one: the numbers would be the baseline's."""
        if plan.layers and self.packed_share(plan) == 0:
            raise DataError(
                f"no scored token of windows of {self.windows.tokens.shape[1]} tokens would read a quantized token in "
                f"mode {self.mode!r}, since recipe {plan.recipe.name!r} keeps them all exact: use a larger --seq-len."
            )

    def score(
        self,
        model: PreTrainedModel,
        plans: Mapping[Hashable, CachePlan],
        answers: Mapping[Hashable, Answers],
        found: Mapping[Hashable, TextScores] | Sequence[TextScores],
        baseline: PreTrainedModel | None = None,
        batch_size: int = 1,
    ) -> Iterator[int]:
        """Fill ``found`` under every plan, window by window, and yield how many windows are done.

        Windows that ``answers`` has are taken from there. ``baseline`` None: the model without quantization; its
        forward is shared by the plans.
        """
        tokens, first = self.windows.tokens, self.windows.first
        for start in range(0, len(tokens), batch_size):
            rows = range(start, min(start + batch_size, len(tokens)))
            names = [item_name("window", tokens[row].tolist(), first[row]) for row in rows]
            kept = {name: answers[name].get(names) for name in plans}
            missing = {name: plan for name, plan in plans.items() if kept[name] is None}
            fresh: dict[Hashable, list[WindowScore]] = {name: [] for name in missing}
            if missing:
                part = replace(self.windows, tokens=tokens[start : rows.stop], first=first[start : rows.stop])
                settings = {"chunk": self.chunk, "batch_size": batch_size, "baseline": baseline}
                for scores in score_windows(model, missing, part, self.mode, **settings):
                    for name, score in scores.items():
                        fresh[name].append(score)
            for name in plans:
                if name in missing:
                    answers[name].put(zip(names, [score.to_data() for score in fresh[name]]))
                own = fresh.get(name) or [WindowScore.of_data(data) for data in kept[name]]
                found[name].scores.extend(own)
            yield rows.stop

    def layer_errors(self, model: PreTrainedModel, plan: CachePlan, answers: Answers) -> tuple[LayerRow, ...]:
        """Of the first window; kept as the scores are."""
        if not plan.layers:
            return ()
        tokens, context = self.windows.tokens[0], self.windows.context
        name = item_name("layers", tokens.tolist(), context)

        def rows():
            return [
                asdict(row) for row in layer_errors(model, plan, tokens, self.mode, chunk=self.chunk, context=context)
            ]

        return tuple(LayerRow(**row) for row in answers.recall([name], lambda: [rows()])[0])

    def results(
        self, names: Sequence[str], found: TextScores, plan: CachePlan, decode: Callable[[list[int]], str]
    ) -> dict[str, PerplexityResult | DivergenceResult]:
        """The results of the text tasks, by name."""
        make = {
            "perplexity": lambda: perplexity(found.scores),
            "divergence": lambda: divergence(found.scores, self.windows, self.reads(plan), found.layers, decode),
        }
        return {name: make[name]() for name in names}
