"""Tasks on a text: its windows, scored under any number of plans, and what was found in earlier runs."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvq.cache import CachePlan
from kvq.calib.data import SEPARATOR, load_texts, source_name, tokenizer_hash
from kvq.errors import DataError
from kvq.eval.divergence import divergence
from kvq.eval.layers import layer_errors
from kvq.eval.likelihood import Windows, WindowScore, score_windows
from kvq.eval.perplexity import cut_windows, perplexity
from kvq.eval.result import DivergenceResult, LayerRow, PerplexityResult
from kvq.eval.results_cache import Answers, item_name
from kvq.eval.two_view_attention import reads_packed

TEXT_TASKS = ("perplexity", "divergence")


@dataclass(frozen=True)
class Text:
    """The scored text: its windows, and what it is."""

    windows: Windows
    identity: Mapping[str, Any]

    @classmethod
    def load(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        data: str | Path,
        *,
        seq_len: int,
        stride: int | None,
        limit: int | None,
        mode: str,
    ) -> "Text":
        ids, identity = text_ids(tokenizer, data)
        return cls(windows=cut_windows(ids, seq_len, stride, limit, mode), identity=identity)

    def reads(self, plan: CachePlan, mode: str, chunk: int) -> torch.Tensor:
        """bool [T]: the query at this position of a window reads a quantized token."""
        return reads_packed(plan, mode, self.windows.tokens.shape[1], chunk=chunk, context=self.windows.context)

    def packed_share(self, plan: CachePlan, mode: str, chunk: int, windows: int | None = None) -> float:
        """Share of the scored tokens (of the first ``windows`` windows) whose query reads a quantized token."""
        reads, length = self.reads(plan, mode, chunk), self.windows.tokens.shape[1]
        # Token i is predicted by the query at i - 1.
        counts = [(int(reads[first - 1 : -1].sum()), length - first) for first in self.windows.first[:windows]]
        return sum(read for read, _ in counts) / sum(scored for _, scored in counts)

    def refuse_unread(self, plan: CachePlan, mode: str, chunk: int) -> None:
        """Raise DataError if no scored token would read a quantized one: the numbers would be the baseline's."""
        if plan.layers and self.packed_share(plan, mode, chunk) == 0:
            raise DataError(
                f"no scored token of windows of {self.windows.tokens.shape[1]} tokens would read a quantized token in "
                f"mode {mode!r}, since recipe {plan.recipe.name!r} keeps them all exact: use a larger --seq-len."
            )


@dataclass
class TextScores:
    """What one plan got: scores of the first windows, and the error of each layer."""

    scores: list[WindowScore] = field(default_factory=list)
    layers: tuple[LayerRow, ...] = ()


def text_ids(tokenizer: PreTrainedTokenizerBase, data: str | Path) -> tuple[list[int], dict[str, Any]]:
    """Token ids of the evaluation part of a source, tokenised once without special tokens, and what the text is."""
    text = SEPARATOR.join(load_texts(data, part="evaluation"))
    # verbose=False: a text longer than the model's context is the rule here, not a mistake.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids, {
        "source": source_name(data),
        "sha256": hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(),
        "tokenizer_sha256": tokenizer_hash(tokenizer),
        "tokens": len(ids),
    }


def score_text(
    text: Text,
    model: PreTrainedModel,
    plans: Mapping[str, CachePlan],
    answers: Mapping[str, Answers],
    *,
    mode: str,
    chunk: int,
    batch_size: int,
    baseline: PreTrainedModel | None,
    found: Mapping[str, TextScores],
) -> Iterator[int]:
    """Fill ``found`` under every plan, window by window, and yield how many windows are done.

    Windows that ``answers`` has are taken from there. ``baseline`` None: the model without quantization; its forward is
    shared by the plans.
    """
    windows, total = text.windows, len(text.windows.tokens)
    for start in range(0, total, batch_size):
        rows = range(start, min(start + batch_size, total))
        names = [item_name("window", windows.tokens[row].tolist(), windows.first[row]) for row in rows]
        kept = {name: answers[name].get(names) for name in plans}
        missing = {name: plan for name, plan in plans.items() if kept[name] is None}
        fresh: dict[str, list[WindowScore]] = {name: [] for name in missing}
        if missing:
            part = Windows(
                tokens=windows.tokens[start : rows.stop],
                first=windows.first[start : rows.stop],
                context=windows.context,
            )
            settings = {"chunk": chunk, "batch_size": batch_size, "baseline": baseline}
            for scores in score_windows(model, missing, part, mode, **settings):
                for name, score in scores.items():
                    fresh[name].append(score)
        for name in plans:
            if name in missing:
                answers[name].put(zip(names, [score.to_data() for score in fresh[name]]))
            own = fresh.get(name) or [WindowScore.of_data(data) for data in kept[name]]
            found[name].scores.extend(own)
        yield rows.stop


def errors_by_layer(
    text: Text, model: PreTrainedModel, plan: CachePlan, answers: Answers, *, mode: str, chunk: int
) -> tuple[LayerRow, ...]:
    """Of the first window; kept as the scores are."""
    if not plan.layers:
        return ()
    tokens = text.windows.tokens[0]
    name = item_name("layers", tokens.tolist(), text.windows.context)
    kept = answers.get([name])
    if kept is None:
        rows = layer_errors(model, plan, tokens, mode, chunk=chunk, context=text.windows.context)
        kept = [[asdict(row) for row in rows]]
        answers.put([(name, kept[0])])
    return tuple(LayerRow(**row) for row in kept[0])


def text_results(
    names: Sequence[str],
    text: Text,
    found: TextScores,
    plan: CachePlan,
    decode: Callable[[list[int]], str],
    *,
    mode: str,
    chunk: int,
) -> dict[str, PerplexityResult | DivergenceResult]:
    """The results of the text tasks, by name."""
    results = {}
    for name in names:
        if name == "perplexity":
            results[name] = perplexity(found.scores)
        else:
            reads = text.reads(plan, mode, chunk)
            results[name] = divergence(found.scores, text.windows, reads, found.layers, decode)
    return results
