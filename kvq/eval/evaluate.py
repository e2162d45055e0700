"""Score models while they read their quantized cache, beside the same weights without quantization."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from kvq.calib.data import tokenizer_hash
from kvq.calib.stats import Stats
from kvq.errors import DataError, RecipeError
from kvq.eval.evaluated_model import EvaluatedModel, load_evaluated
from kvq.eval.evaluation_run import Progress, Run
from kvq.eval.harness import find_tasks
from kvq.eval.identity import model_hash
from kvq.eval.result import EvalResult
from kvq.eval.settings import OWN_TASKS, Settings
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
    recipes = None if recipe is None else [recipe]
    return compare([model], recipes, baseline=baseline, stats=stats, dtype=dtype, progress=progress, **settings)[0]


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
    chosen = Settings(**settings)
    if recipes is not None and len(models) != 1:
        raise RecipeError("recipes are compared on one model: name one, or compare exports without recipes.")
    if not models or (recipes is not None and not recipes):
        raise DataError("there is nothing to compare: name exports, or a model and recipes.")
    where = {"task_dir": chosen.task_dir, "task_data": chosen.task_data, "files": chosen.task_files}
    with find_tasks(chosen.foreign, **where, own=OWN_TASKS) as tasks:
        if recipes is not None:
            first = load_evaluated(models[0], recipes[0], stats=stats, dtype=dtype)
            candidates = [first, *(replace(first, plan=first.plan_for(recipe, stats)) for recipe in recipes[1:])]
        else:
            candidates = _exports(models, baseline is None, dtype)
        other = None
        if baseline is not None:
            other = load_evaluated(baseline, dtype=dtype)
            _same_tokens(other, candidates[0])
        elif recipes is None and len(models) > 1:
            other = candidates[0]
        return Run(chosen, tasks, candidates, other, progress).results()


def _same_tokens(other: EvaluatedModel, evaluated: EvaluatedModel) -> None:
    # Token by token comparison needs the same tokens.
    if tokenizer_hash(other.tokenizer) != tokenizer_hash(evaluated.tokenizer):
        raise DataError(
            f"baseline {other.name!r} has another tokenizer than {evaluated.name!r}: compare models of one tokenizer."
        )


def _exports(models: Sequence[str | Path], of_one_source: bool, dtype) -> list[EvaluatedModel]:
    """Models in the given order; those of the same weights share one in memory.

    of_one_source   refuse exports of different models: nothing else is there to compare them with.
    """
    found: list[EvaluatedModel] = []
    loaded: dict[str, EvaluatedModel] = {}
    for model in models:
        own = load_evaluated(model, dtype=dtype)
        if found:
            _same_tokens(found[0], own)
            if of_one_source and own.source != found[0].source:
                raise DataError(
                    f"{own.name!r} and {found[0].name!r} come from different models: name the one to compare with "
                    "(--baseline)."
                )
        found.append(replace(own, model=loaded.setdefault(model_hash(own.folder), own).model))
    return found
