"""Score models while they read their quantized cache, beside the same weights without quantization."""

from collections.abc import Sequence
from pathlib import Path

import torch

from kvq.calib.data import tokenizer_hash
from kvq.calib.stats import Stats
from kvq.errors import DataError, RecipeError
from kvq.eval.evaluated_model import EvaluatedModel, load_evaluated
from kvq.eval.evaluation_run import Candidate, Progress, Run
from kvq.eval.harness import find_tasks
from kvq.eval.identity import model_hash
from kvq.eval.result import EvalResult
from kvq.eval.settings import OWN_TASKS, Settings, settings_of
from kvq.recipe import Recipe


def evaluate(
    model: str | Path,
    recipe: Recipe | str | Path | None = None,
    *,
    baseline: str | Path | None = None,
    stats: Stats | str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    progress: Progress | None = None,
    **settings,
) -> EvalResult:
    """Evaluate an export (with its own recipe) or any model under ``recipe`` (None: fp16, nothing quantized).

    baseline    model to compare with; None: the same weights without quantization, in this run.
    stats       statistics, or their file, for a recipe that needs them.
    progress    called with (done, total, what) of the running task.
    settings    fields of ``kvq.eval.settings.Settings``.

    Interrupted (KeyboardInterrupt) after it has found something, it returns that, marked ``partial``; before that the
    interrupt passes through. The same call continues where a call was interrupted, or killed, and returns what it would
    have returned.

    Raises DataError for unknown tasks or modes, texts and windows that do not fit or whose tokens would read nothing
    quantized, and logits that are not finite; RecipeError, ModelNotFoundError, CheckpointError or
    UnsupportedModelError as recipe and model demand.
    """
    chosen = settings_of(**settings)
    with _tasks(chosen) as tasks:
        evaluated = load_evaluated(model, recipe, stats=stats, dtype=dtype)
        other = None if baseline is None else _load_baseline(baseline, evaluated, dtype)
        return Run(chosen, tasks, other, progress).results([Candidate(evaluated, evaluated.plan)])[0]


def compare(
    models: Sequence[str | Path],
    recipes: Sequence[Recipe | str | Path] | None = None,
    *,
    baseline: str | Path | None = None,
    stats: Stats | str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    progress: Progress | None = None,
    **settings,
) -> list[EvalResult]:
    """Evaluate several exports, or one model under several recipes, on the same requests; the baseline runs once.

    baseline    model to compare with; None: the first model's weights without quantization. Exports of different models
                need one.

    Everything else is as for ``evaluate``. An interrupted comparison returns what is finished of each.
    """
    chosen = settings_of(**settings)
    if recipes is not None and len(models) != 1:
        raise RecipeError("recipes are compared on one model: name one, or compare exports without recipes.")
    if not models or (recipes is not None and not recipes):
        raise DataError("there is nothing to compare: name exports, or a model and recipes.")
    with _tasks(chosen) as tasks:
        if recipes is not None:
            candidates = _by_recipe(models[0], recipes, stats, dtype)
        else:
            candidates = _exports(models, baseline, dtype)
        first = candidates[0].evaluated
        other = None if baseline is None else _load_baseline(baseline, first, dtype)
        if other is None and any(candidate.evaluated is not first for candidate in candidates):
            other = first
        return Run(chosen, tasks, other, progress).results(candidates)


def _tasks(settings: Settings):
    where = {"task_dir": settings.task_dir, "task_data": settings.task_data, "files": settings.task_files}
    return find_tasks(settings.foreign, **where, own=OWN_TASKS)


def _load_baseline(name: str | Path, evaluated: EvaluatedModel, dtype) -> EvaluatedModel:
    other = load_evaluated(name, dtype=dtype)
    _same_tokens(other, evaluated)
    return other


def _same_tokens(other: EvaluatedModel, evaluated: EvaluatedModel) -> None:
    # Token by token comparison needs the same tokens.
    if tokenizer_hash(other.tokenizer) != tokenizer_hash(evaluated.tokenizer):
        raise DataError(
            f"baseline {other.name!r} has another tokenizer than {evaluated.name!r}: compare models of one tokenizer."
        )


def _by_recipe(model, recipes, stats, dtype) -> list[Candidate]:
    evaluated = load_evaluated(model, recipes[0], stats=stats, dtype=dtype)
    plans = [evaluated.plan, *(evaluated.plan_for(recipe, stats) for recipe in recipes[1:])]
    return [Candidate(evaluated, plan) for plan in plans]


def _exports(models, baseline, dtype) -> list[Candidate]:
    """Models in the given order; those of the same weights share one in memory."""
    found: list[Candidate] = []
    loaded: dict[str, EvaluatedModel] = {}
    for model in models:
        evaluated = load_evaluated(model, dtype=dtype)
        if found:
            _same_tokens(found[0].evaluated, evaluated)
            if baseline is None and evaluated.source != found[0].evaluated.source:
                raise DataError(
                    f"{evaluated.name!r} and {found[0].evaluated.name!r} come from different models: name the one to "
                    "compare with (--baseline)."
                )
        shared = loaded.setdefault(model_hash(evaluated.folder), evaluated)
        found.append(Candidate(evaluated.sharing(shared), evaluated.plan))
    return found
