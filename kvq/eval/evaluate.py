"""Score a model while it reads its quantized cache, beside the same weights without quantization."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kvq.cache.two_view import MODES, reads_packed
from kvq.calib.data import SEPARATOR, load_texts, source_name, tokenizer_hash
from kvq.calib.stats import Stats
from kvq.errors import DataError, suggest
from kvq.eval.bits import measured_bits
from kvq.eval.divergence import divergence
from kvq.eval.harness import run_tasks, task_manager
from kvq.eval.likelihood import Windows, WindowScore, score_windows
from kvq.eval.perplexity import cut_windows, perplexity
from kvq.eval.result import EvalResult, installed_versions
from kvq.integrations.subject import Subject, load_subject
from kvq.recipe import Recipe

# Tasks on a text, by name; every other name is lm-eval's.
TEXT_TASKS: dict[str, Callable[[Sequence[WindowScore]], Any]] = {"perplexity": perplexity, "divergence": divergence}
DEFAULT_SEQ_LEN = 2048


@dataclass
class _Text:
    """The scored text: its windows, what it is, and what was found so far."""

    windows: Windows
    identity: dict[str, Any]
    scores: list[WindowScore] = field(default_factory=list)
    interrupted: bool = False


def evaluate(
    model: str | Path,
    recipe: Recipe | str | Path | None = None,
    *,
    tasks: Sequence[str] = ("perplexity", "divergence"),
    data: str | Path = "builtin",
    seq_len: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
    mode: str = "stream",
    chunk: int = 512,
    baseline: str | Path | None = None,
    stats: Stats | str | Path | None = None,
    task_dir: str | Path | None = None,
    batch_size: int = 1,
    dtype: torch.dtype | str | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> EvalResult:
    """Evaluate an export (with its own recipe) or any model under ``recipe`` (None: fp16, nothing quantized).

    tasks       perplexity and divergence on a text, and lm-eval tasks by name.
    data        the text: ``builtin`` (its evaluation part), a .txt file, a .jsonl or .parquet file with a field
                ``text``, or a hub id. Tokenised once, without special tokens.
    seq_len     tokens a window; by default 2,048, or the model's maximum if that is less.
    stride      tokens from one window to the next (default: seq_len); see ``kvq.eval.perplexity``.
    limit       windows of the text, and documents of each lm-eval task.
    mode        stream, prefill, chunked or simulate; see ``kvq.cache.two_view``. chunk: tokens a chunk (chunked).
    baseline    model to compare with; None: the same weights without quantization, in this run.
    stats       statistics, or their file, for a recipe with static scales.
    task_dir    folder with lm-eval task files; then no other lm-eval task is known.
    batch_size  windows, or requests, a forward.
    progress    called with (windows done, windows in all).

    Interrupted (KeyboardInterrupt) after at least one window, it returns what the finished windows give, marked
    ``partial``, without lm-eval tasks; before that the interrupt passes through.

    Raises DataError for unknown tasks or modes, texts and windows that do not fit, and logits that are not finite;
    RecipeError, ModelNotFoundError, CheckpointError or UnsupportedModelError as recipe and model demand.
    """
    own, foreign, manager = _check(tasks, mode, batch_size, limit, task_dir)
    subject = load_subject(model, recipe, stats=stats, dtype=dtype)
    other = None if baseline is None else _load_baseline(baseline, subject, dtype)
    seq_len = _seq_len(seq_len, subject, mode)
    text, results = None, {}
    if own:
        text = _text(subject, data, seq_len, stride, limit, mode)
        _score(text, subject, other, mode, chunk, batch_size, progress)
        results = {name: TEXT_TASKS[name](text.scores) for name in own}
    partial = text is not None and text.interrupted
    if foreign and not partial:
        settings = {"mode": mode, "chunk": chunk, "limit": limit, "batch_size": batch_size, "seed": seed}
        results |= run_tasks(subject, other, foreign, manager, **settings)
    return EvalResult(
        model=subject.name,
        baseline="the same weights, not quantized" if other is None else other.name,
        recipe=subject.plan.recipe.to_dict(),
        recipe_hash=subject.plan.recipe.hash,
        mode=mode,
        chunk=chunk if mode == "chunked" else None,
        bits_per_element=measured_bits(subject.plan, seq_len, subject.cache_dtype),
        bits_tokens=seq_len,
        asymptotic_bits=subject.plan.bits_per_element,
        cache_dtype=_dtype_name(subject.cache_dtype),
        results=results,
        seq_len=seq_len,
        stride=(stride or seq_len) if text else None,
        windows=len(text.scores) if text else 0,
        tokens=sum(len(score.losses) for score in text.scores) if text else 0,
        packed_share=_packed_share(subject, text, mode, chunk) if text else None,
        data=text.identity if text else None,
        seed=seed,
        dtype=_dtype_name(subject.model.dtype),
        device=subject.model.device.type,
        implementation="two-view attention, torch reference" if subject.plan.layers else "the model's own attention",
        partial=partial,
        versions=installed_versions(*(["lm_eval"] if foreign else [])),
    )


def _check(tasks: Sequence[str], mode: str, batch_size: int, limit: int | None, task_dir):
    """Refuse what can be refused before a model is loaded; splits the tasks."""
    if isinstance(tasks, str) or not tasks:
        raise DataError(f"tasks={tasks!r} is not a list of tasks: give for example ('perplexity', 'divergence').")
    if mode not in MODES:
        raise DataError(f"unknown mode {mode!r}.{suggest(str(mode), MODES)}")
    if batch_size < 1:
        raise DataError(f"batch_size={batch_size} is not a number of windows: use 1 or more.")
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit} leaves nothing to score: use 1 or more.")
    tasks = tuple(dict.fromkeys(tasks))
    own = tuple(name for name in tasks if name in TEXT_TASKS)
    foreign = tuple(name for name in tasks if name not in TEXT_TASKS)
    return own, foreign, task_manager(foreign, task_dir, tuple(TEXT_TASKS)) if foreign else None


def _load_baseline(name: str | Path, subject: Subject, dtype) -> Subject:
    other = load_subject(name, dtype=dtype)
    # Token by token comparison needs the same tokens.
    if tokenizer_hash(other.tokenizer) != tokenizer_hash(subject.tokenizer):
        raise DataError(
            f"baseline {other.name!r} has another tokenizer than {subject.name!r}: compare models of one tokenizer."
        )
    return other


def _seq_len(seq_len: int | None, subject: Subject, mode: str) -> int:
    longest = subject.plan.model.max_length
    if seq_len is None:
        return min(DEFAULT_SEQ_LEN, longest)
    shortest = 4 if mode == "prefill" else 2
    if seq_len < shortest:
        raise DataError(f"seq_len={seq_len} leaves nothing to score in mode {mode!r}: use {shortest} or more.")
    if seq_len > longest:
        raise DataError(f"seq_len={seq_len} is more than the {longest} tokens this model takes: use at most {longest}.")
    return seq_len


def _text(subject: Subject, data: str | Path, seq_len: int, stride: int | None, limit: int | None, mode: str) -> _Text:
    text = SEPARATOR.join(load_texts(data, part="evaluation"))
    # verbose=False: a text longer than the model's context is the rule here, not a mistake.
    ids = subject.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    identity = {
        "source": source_name(data),
        "sha256": hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(),
        "tokenizer_sha256": tokenizer_hash(subject.tokenizer),
        "tokens": len(ids),
    }
    return _Text(windows=cut_windows(ids, seq_len, stride, limit, mode), identity=identity)


def _score(text: _Text, subject: Subject, other: Subject | None, mode, chunk, batch_size, progress) -> None:
    """Fill ``text.scores`` window by window; an interrupt after the first keeps what is done."""
    total = len(text.windows.tokens)
    if progress:
        progress(0, total)
    try:
        for score in _scores(text.windows, subject, other, mode, chunk, batch_size):
            text.scores.append(score)
            if progress:
                progress(len(text.scores), total)
    except KeyboardInterrupt:
        if not text.scores:
            raise
        text.interrupted = len(text.scores) < total


def _scores(
    windows: Windows, subject: Subject, other: Subject | None, mode, chunk, batch_size
) -> Iterator[WindowScore]:
    name = subject.plan.recipe.name
    baseline = None if other is None else other.model
    settings = {"chunk": chunk, "batch_size": batch_size, "baseline": baseline}
    for found in score_windows(subject.model, {name: subject.plan}, windows, mode, **settings):
        yield found[name]


def _packed_share(subject: Subject, text: _Text, mode: str, chunk: int) -> float:
    length = text.windows.tokens.shape[1]
    reads = reads_packed(subject.plan, mode, length, chunk=chunk, context=text.windows.context)
    # Token i is predicted by the query at i - 1.
    counts = [(int(reads[first - 1 : -1].sum()), length - first) for first in text.windows.first[: len(text.scores)]]
    return sum(read for read, _ in counts) / sum(scored for _, scored in counts)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
