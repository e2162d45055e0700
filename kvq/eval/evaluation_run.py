"""One evaluation: every task under every candidate, beside one baseline."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvq.cache import CachePlan
from kvq.eval.evaluated_model import EvaluatedModel
from kvq.eval.greedy import greedy_continuations
from kvq.eval.harness import Harness, Tasks, TaskSettings
from kvq.eval.identity import answers_key, code_version, model_hash, plan_hash
from kvq.eval.measured_bits import measured_bits
from kvq.eval.probes import PROBES
from kvq.eval.probes.base import Setting
from kvq.eval.probing import ask, pair
from kvq.eval.result import EvalResult, installed_versions
from kvq.eval.results_cache import Answers
from kvq.eval.settings import SPEED, Settings
from kvq.eval.speed import decode_speed
from kvq.eval.text_tasks import Text, TextScores, errors_by_layer, score_text, text_ids, text_results

Progress = Callable[[int, int, str], None]
MEMORY_LENGTHS = (4_096, 32_768, 131_072)


@dataclass(frozen=True)
class Candidate:
    """One thing to evaluate: a loaded model, and the plan that its cache follows."""

    evaluated: EvaluatedModel
    plan: CachePlan


class Run:
    """One evaluation: every task under every candidate, beside one baseline."""

    def __init__(
        self, settings: Settings, tasks: Tasks | None, baseline: EvaluatedModel | None, progress: Progress | None
    ):
        self.settings, self.tasks, self.baseline = settings, tasks, baseline
        self.progress = progress or (lambda done, total, what: None)
        self.found: list[dict[str, Any]] = []
        self.text: Text | None = None
        self.scores: list[TextScores] = []

    def results(self, candidates: Sequence[Candidate]) -> list[EvalResult]:
        self.candidates = candidates
        self.found = [{} for _ in candidates]
        self.scores = [TextScores() for _ in candidates]
        spec = candidates[0].plan.model
        self.settings.check_model(spec.max_length)
        self.window = self.settings.window(spec.max_length)
        self._load_text()
        interrupted = False
        try:
            self._run()
        except KeyboardInterrupt:
            if not any(self.found) and not any(scores.scores for scores in self.scores):
                raise
            interrupted = True
        return [self._result(index, interrupted) for index in range(len(candidates))]

    def _run(self) -> None:
        settings = self.settings
        if settings.text_tasks:
            self._score_text()
        for name in settings.probes:
            self._probe(name)
        for name in settings.foreign:
            self._harness(name)
        if SPEED in settings.tasks:
            self._speed()

    def _answers(self, evaluated: EvaluatedModel, plan: CachePlan | None, **task: Any) -> Answers:
        return Answers(self.settings.cache_folder, answers_key(evaluated, plan, **task))

    @property
    def _modes(self) -> dict[str, Any]:
        return {"mode": self.settings.mode, "chunk": self.settings.chunk if self.settings.mode == "chunked" else None}

    def _reference(self, candidate: Candidate) -> EvaluatedModel:
        return self.baseline or candidate.evaluated

    # Tasks on the text.

    def _load_text(self) -> None:
        settings = self.settings
        if not settings.text_tasks:
            return
        shape = {"seq_len": self.window, "stride": settings.stride, "limit": settings.limit, "mode": settings.mode}
        self.text = Text.load(self.candidates[0].evaluated.tokenizer, settings.data, **shape)
        for candidate in self.candidates:
            self.text.refuse_unread(candidate.plan, settings.mode, settings.chunk)

    def _score_text(self) -> None:
        settings, total = self.settings, len(self.text.windows.tokens)
        groups: dict[int, list[int]] = {}
        for index, candidate in enumerate(self.candidates):
            groups.setdefault(id(candidate.evaluated.model), []).append(index)
        for members in groups.values():
            evaluated = self.candidates[members[0]].evaluated
            baseline = None if self.baseline is None or self.baseline is evaluated else self.baseline
            answers = {index: self._text_answers(index, baseline) for index in members}
            self.progress(0, total, "text")
            # First, so that a text that is interrupted has them, too.
            if "divergence" in settings.text_tasks:
                for index in members:
                    self.scores[index].layers = errors_by_layer(
                        self.text,
                        evaluated.model,
                        self.candidates[index].plan,
                        answers[index],
                        mode=settings.mode,
                        chunk=settings.chunk,
                    )
            scored = score_text(
                self.text,
                evaluated.model,
                {index: self.candidates[index].plan for index in members},
                answers,
                mode=settings.mode,
                chunk=settings.chunk,
                batch_size=settings.batch_size,
                baseline=None if baseline is None else baseline.model,
                found={index: self.scores[index] for index in members},
            )
            for done in scored:
                self.progress(done, total, "text")

    def _text_answers(self, index: int, baseline: EvaluatedModel | None) -> Answers:
        candidate = self.candidates[index]
        beside = model_hash((baseline or candidate.evaluated).folder)
        return self._answers(
            candidate.evaluated, candidate.plan, task="text", baseline=beside, batch_size=self.settings.batch_size,
            limit=self.settings.limit, **self._modes,
        )  # fmt: skip

    # kvq's own tasks with questions.

    def _probe(self, name: str) -> None:
        settings, probe, first = self.settings, PROBES[name], self.candidates[0]
        reference = self._reference(first)
        plain = self._answers(reference, None, task=name, version=probe.version)
        ids, identity = text_ids(first.evaluated.tokenizer, settings.data)
        passages = probe.build(
            Setting(
                encode=lambda text: first.evaluated.tokenizer(text, add_special_tokens=False, verbose=False)[
                    "input_ids"
                ],
                filler=ids,
                lengths=settings.lengths,
                count=settings.limit,
                seed=settings.seed,
                longest=first.plan.model.max_length,
                generate=lambda prompts, tokens: greedy_continuations(
                    reference.model, prompts, tokens, batch_size=8, answers=plain
                ),
            )
        )
        modes = {"mode": settings.mode, "chunk": settings.chunk}
        step = self._step(f"{name}, baseline")
        base = ask(reference.model, None, passages, plain, progress=step, **modes)
        for index, candidate in enumerate(self.candidates):
            found = base
            quantizes = bool(candidate.plan.layers)
            if quantizes or candidate.evaluated.model is not reference.model:
                answers = self._answers(
                    candidate.evaluated, candidate.plan, task=name, version=probe.version, **self._modes
                )
                step = self._step(f"{name}, {candidate.plan.recipe.name}")
                found = ask(candidate.evaluated.model, candidate.plan, passages, answers, progress=step, **modes)
            self.found[index][name] = pair(
                probe, found, base, mode=settings.mode, quantizes=quantizes, data=identity | {"seed": settings.seed}
            )

    # lm-eval's tasks.

    def _harness(self, task: str) -> None:
        settings = self.settings
        shared = ("mode", "chunk", "limit", "fewshot", "chat", "batch_size", "seed")
        harness = Harness(
            self.tasks,
            TaskSettings(**{name: getattr(settings, name) for name in shared}),
            lambda key: Answers(settings.cache_folder, key),
        )
        reference = self._reference(self.candidates[0])
        base = harness.run(task, reference, None, self._step(f"{task}, baseline"))
        for index, candidate in enumerate(self.candidates):
            run = base
            if candidate.plan.layers or candidate.evaluated.model is not reference.model:
                step = self._step(f"{task}, {candidate.plan.recipe.name}")
                run = harness.run(task, candidate.evaluated, candidate.plan, step)
            self.found[index] |= harness.pair(task, run, base)

    def _speed(self) -> None:
        for index, candidate in enumerate(self.candidates):
            self.progress(index, len(self.candidates), SPEED)
            ids, _ = text_ids(candidate.evaluated.tokenizer, self.settings.data)
            self.found[index][SPEED] = decode_speed(
                candidate.evaluated.model, candidate.plan, ids, candidate.plan.model.max_length
            )

    def _step(self, what: str) -> Callable[[int, int], None]:
        return lambda done, total: self.progress(done, total, what)

    # The result.

    def _result(self, index: int, interrupted: bool) -> EvalResult:
        settings, candidate, scores = self.settings, self.candidates[index], self.scores[index]
        evaluated, plan, text = candidate.evaluated, candidate.plan, self.text
        results: dict[str, Any] = {}
        if scores.scores:
            tokens = evaluated.tokenizer
            results = text_results(
                settings.text_tasks, text, scores, plan, tokens.decode, mode=settings.mode, chunk=settings.chunk
            )
        results |= self.found[index]
        windows = len(scores.scores)
        missing = [name for name in settings.tasks if name not in results]
        partial = interrupted and (bool(missing) or (text is not None and windows < len(text.windows.tokens)))
        reference = self._reference(candidate)
        return EvalResult(
            model=evaluated.name,
            baseline="the same weights, not quantized" if self.baseline in (None, evaluated) else self.baseline.name,
            recipe=plan.recipe.to_dict(),
            recipe_hash=plan.recipe.hash,
            mode=settings.mode,
            chunk=settings.chunk if settings.mode == "chunked" else None,
            bits_per_element=measured_bits(plan, self.window, evaluated.cache_dtype),
            bits_tokens=self.window,
            asymptotic_bits=plan.bits_per_element,
            cache_dtype=_dtype_name(evaluated.cache_dtype),
            results=results,
            seq_len=self.window,
            stride=(settings.stride or self.window) if text else None,
            windows=windows,
            tokens=sum(len(score.losses) for score in scores.scores),
            packed_share=text.packed_share(plan, settings.mode, settings.chunk, windows) if windows else None,
            data=text.identity if text else None,
            seed=settings.seed,
            dtype=_dtype_name(evaluated.model.dtype),
            device=evaluated.model.device.type,
            implementation="two-view attention, torch reference" if plan.layers else "the model's own attention",
            partial=partial,
            unfinished=missing if partial else (),
            memory=_memory(plan),
            hashes={
                "model": model_hash(evaluated.folder),
                "baseline": model_hash(reference.folder),
                "plan": plan_hash(plan),
                "code": code_version(),
            },
            versions=installed_versions(*(["lm_eval"] if settings.foreign else [])),
        )


def _memory(plan: CachePlan) -> list[Mapping[str, int]]:
    plain = CachePlan(recipe=plan.recipe, model=plan.model, layers={})
    return [
        {
            "tokens": tokens,
            "plain_bytes": plain.predicted_bytes(tokens, itemsize=2),
            "recipe_bytes": plan.predicted_bytes(tokens, itemsize=2),
        }
        for tokens in MEMORY_LENGTHS
    ]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
