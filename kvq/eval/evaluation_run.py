"""One evaluation: every task under every candidate, beside one baseline."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from kvq.eval.evaluated_model import EvaluatedModel
from kvq.eval.greedy import greedy_continuations
from kvq.eval.harness import Harness, Tasks
from kvq.eval.identity import answers_key, code_version, model_hash, plan_hash
from kvq.eval.measured_bits import measured_bits
from kvq.eval.probes import PROBES
from kvq.eval.probes.base import Setting
from kvq.eval.probing import ask, pair
from kvq.eval.result import EvalResult, installed_versions
from kvq.eval.results_cache import Answers
from kvq.eval.settings import SPEED, Settings
from kvq.eval.speed import decode_speed
from kvq.eval.text_tasks import Text, TextScores, text_ids

Progress = Callable[[int, int, str], None]
MEMORY_LENGTHS = (4_096, 32_768, 131_072)


class Run:
    """Every task under every candidate; each is a loaded model and the plan that its cache follows.

    baseline   what all are compared with; None: each one's own weights without quantization.
    """

    def __init__(
        self,
        settings: Settings,
        tasks: Tasks | None,
        candidates: Sequence[EvaluatedModel],
        baseline: EvaluatedModel | None,
        progress: Progress | None,
    ):
        self.settings, self.tasks, self.candidates, self.baseline = settings, tasks, candidates, baseline
        self.progress = progress or (lambda done, total, what: None)
        self.found: list[dict[str, Any]] = [{} for _ in candidates]
        self.scores = [TextScores() for _ in candidates]
        self.longest = candidates[0].plan.model.max_length
        settings.check_model(self.longest)
        self.window = settings.window(self.longest)
        self.text = Text.load(candidates[0].tokenizer, settings, self.window) if settings.text_tasks else None
        for candidate in candidates if self.text else ():
            self.text.refuse_unread(candidate.plan)

    def results(self) -> list[EvalResult]:
        interrupted = False
        try:
            self._run()
        except KeyboardInterrupt:
            if not any(self.found) and not any(scores.scores for scores in self.scores):
                raise
            interrupted = True
        return [self._result(index, interrupted) for index in range(len(self.candidates))]

    def _run(self) -> None:
        if self.text:
            self._score_text(self.text)
        for name in self.settings.probes:
            self._probe(name)
        if self.tasks:
            harness = Harness(self.tasks, self.settings)
            for name in self.settings.foreign:
                for found, _, own, base in self._beside(name, lambda *args, name=name: harness.run(name, *args)):
                    found |= harness.pair(name, own, base)
        if SPEED in self.settings.tasks:
            self._speed()

    def _answers(self, evaluated: EvaluatedModel, **task: Any) -> Answers:
        return Answers(self.settings.cache_folder, answers_key(evaluated, **task))

    @property
    def _chunk(self) -> int | None:
        return self.settings.chunk if self.settings.mode == "chunked" else None

    def _beside(self, task: str, run: Callable) -> Iterator[tuple[dict[str, Any], EvaluatedModel, Any, Any]]:
        """The results, the candidate, and what ``run(model, progress)`` gives of it and of the baseline, run once."""
        reference = (self.baseline or self.candidates[0]).exact
        base = run(reference, self._step(f"{task}, baseline"))
        for found, candidate in zip(self.found, self.candidates):
            own = base
            if candidate.quantizes or candidate.model is not reference.model:
                own = run(candidate, self._step(f"{task}, {candidate.plan.recipe.name}"))
            yield found, candidate, own, base

    def _step(self, what: str) -> Callable[[int, int], None]:
        return lambda done, total: self.progress(done, total, what)

    def _score_text(self, text: Text) -> None:
        settings, total = self.settings, len(text.windows.tokens)
        groups: dict[int, list[int]] = {}
        for index, candidate in enumerate(self.candidates):
            groups.setdefault(id(candidate.model), []).append(index)
        for members in groups.values():
            first = self.candidates[members[0]]
            baseline = None if self.baseline is first else self.baseline
            plans = {index: self.candidates[index].plan for index in members}
            facts = {"baseline": model_hash((baseline or first).folder), "mode": settings.mode, "chunk": self._chunk}
            facts |= {"task": "text", "batch_size": settings.batch_size, "limit": settings.limit}
            answers = {index: self._answers(self.candidates[index], **facts) for index in members}
            self.progress(0, total, "text")
            # First, so that a text that is interrupted has them, too.
            for index in members if "divergence" in settings.text_tasks else ():
                self.scores[index].layers = text.layer_errors(first.model, plans[index], answers[index])
            other = None if baseline is None else baseline.model
            for done in text.score(first.model, plans, answers, self.scores, other, settings.batch_size):
                self.progress(done, total, "text")

    def _probe(self, name: str) -> None:
        """One of kvq's own tasks with questions."""
        settings, probe, tokenizer = self.settings, PROBES[name], self.candidates[0].tokenizer
        modes = {"mode": settings.mode, "chunk": settings.chunk}
        reference = (self.baseline or self.candidates[0]).exact
        ids, identity = text_ids(tokenizer, settings.data)

        def answers(own: EvaluatedModel) -> Answers:
            # What is not quantized answers alike in every mode.
            mode = {"mode": settings.mode, "chunk": self._chunk} if own.quantizes else {}
            return self._answers(own, task=name, version=probe.version, **mode)

        def written(prompts, tokens):
            return greedy_continuations(reference.model, prompts, tokens, batch_size=8, answers=answers(reference))

        passages = probe.build(
            Setting(
                encode=lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
                filler=ids,
                lengths=settings.lengths,
                count=settings.limit,
                seed=settings.seed,
                longest=self.longest,
                generate=written,
            )
        )

        def asked(own: EvaluatedModel, progress):
            return ask(own.model, own.plan, passages, answers(own), progress=progress, **modes)

        for found, candidate, own, base in self._beside(name, asked):
            data = identity | {"seed": settings.seed}
            found[name] = pair(probe, own, base, mode=settings.mode, quantizes=candidate.quantizes, data=data)

    def _speed(self) -> None:
        for index, own in enumerate(self.candidates):
            self.progress(index, len(self.candidates), SPEED)
            ids, _ = text_ids(own.tokenizer, self.settings.data)
            self.found[index][SPEED] = decode_speed(own.model, own.plan, ids, own.plan.model.max_length)

    def _result(self, index: int, interrupted: bool) -> EvalResult:
        settings, own, scores, text = self.settings, self.candidates[index], self.scores[index], self.text
        plan, windows = own.plan, len(scores.scores)
        results = text.results(settings.text_tasks, scores, plan, own.tokenizer.decode) if text and windows else {}
        results |= self.found[index]
        missing = [name for name in settings.tasks if name not in results]
        partial = interrupted and (bool(missing) or (text is not None and windows < len(text.windows.tokens)))
        return EvalResult(
            model=own.name,
            baseline="the same weights, not quantized" if self.baseline in (None, own) else self.baseline.name,
            recipe=plan.recipe.to_dict(),
            recipe_hash=plan.recipe.hash,
            mode=settings.mode,
            chunk=self._chunk,
            bits_per_element=measured_bits(plan, self.window, own.cache_dtype),
            bits_tokens=self.window,
            asymptotic_bits=plan.bits_per_element,
            cache_dtype=_dtype_name(own.cache_dtype),
            results=results,
            seq_len=self.window,
            stride=(settings.stride or self.window) if text else None,
            windows=windows,
            tokens=sum(len(score.losses) for score in scores.scores),
            packed_share=text.packed_share(plan, windows) if text and windows else None,
            data=text.identity if text else None,
            seed=settings.seed,
            dtype=_dtype_name(own.model.dtype),
            device=own.model.device.type,
            implementation="two-view attention, torch reference" if own.quantizes else "the model's own attention",
            partial=partial,
            unfinished=missing if partial else (),
            memory=[
                {
                    "tokens": tokens,
                    "plain_bytes": own.exact.plan.predicted_bytes(tokens, itemsize=2),
                    "recipe_bytes": plan.predicted_bytes(tokens, itemsize=2),
                }
                for tokens in _memory_lengths(plan.model.max_length)
            ],
            hashes={
                "model": model_hash(own.folder),
                "baseline": model_hash((self.baseline or own).folder),
                "plan": plan_hash(plan),
                "code": code_version(),
            },
            versions=installed_versions(*(["lm_eval"] if settings.foreign else [])),
        )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _memory_lengths(context: int) -> list[int]:
    """Lengths to state memory at: none beyond the model's context, which is the last."""
    return [*(tokens for tokens in MEMORY_LENGTHS if tokens < context), context]
