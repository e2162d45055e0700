"""lm-eval tasks for a recipe and its baseline, on the same requests."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvq.cache import CachePlan
from kvq.errors import DataError, suggest
from kvq.eval.result import MetricResult, TaskResult
from kvq.integrations.subject import Subject


def task_manager(names: tuple[str, ...], task_dir: str | Path | None, own: tuple[str, ...]):
    """Find lm-eval tasks by name: in ``task_dir`` alone if given, else among those that lm-eval ships.

    ``own``: kvq's own tasks, for the suggestion. Raises DataError for an unknown task or a missing folder, and if
    lm-eval is not installed.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise DataError(
            f"task {names[0]!r} is none of {', '.join(own)}, and lm-eval is not installed: run "
            "'pip install 'kvq-toolkit[eval]'' for its tasks."
        ) from None
    if task_dir is not None and not Path(task_dir).is_dir():
        raise DataError(f"task folder {str(task_dir)!r} does not exist: give a folder with task files (.yaml).")
    manager = TaskManager(include_path=None if task_dir is None else str(task_dir), include_defaults=task_dir is None)
    known = [*own, *manager.all_tasks]
    for name in names:
        if name not in known:
            raise DataError(f"unknown task {name!r}.{suggest(name, known)}")
    return manager


def run_tasks(
    subject: Subject,
    baseline: Subject | None,
    names: tuple[str, ...],
    manager,
    *,
    mode: str,
    chunk: int,
    limit: int | None,
    batch_size: int,
    seed: int,
) -> dict[str, TaskResult]:
    """Run every task twice: under the subject's plan, and on ``baseline`` (None: the subject without quantization).

    A plan that quantizes nothing is its own baseline. Raises DataError if a task cannot be set up.
    """
    settings = {"manager": manager, "limit": limit, "seed": seed}
    results = {}
    for name in names:
        # One model a task: it counts which of its tokens read quantized ones.
        model = _model(subject, subject.plan, mode, chunk, batch_size)
        found = base = _run(model, name, settings)
        if baseline is not None or subject.plan.layers:
            base = _run(_model(baseline or subject, None, "stream", chunk, batch_size), name, settings)
        results[name] = _task(name, found, base, model.packed_share)
    return results


def _model(subject: Subject, plan: CachePlan | None, mode: str, chunk: int, batch_size: int):
    from kvq.integrations.lm_eval import KvqLM

    return KvqLM(subject.model, plan=plan, mode=mode, chunk=chunk, tokenizer=subject.tokenizer, batch_size=batch_size)


def _run(model, name: str, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    import lm_eval

    seed = settings["seed"]
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
    try:
        return lm_eval.simple_evaluate(
            model,
            tasks=[name],
            task_manager=settings["manager"],
            limit=settings["limit"],
            bootstrap_iters=1000,
            log_samples=False,
            **seeds,
        )
    except (FileNotFoundError, ConnectionError, KeyError) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(".")
        raise DataError(f"task {name!r} cannot be set up: {why}; check the task file and its data.") from None


def _task(name: str, found: Mapping[str, Any], base: Mapping[str, Any], share: float | None) -> TaskResult:
    own, other = found["results"][name], base["results"][name]
    metrics = {}
    for key, value in own.items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        label = metric if kind == "none" else f"{metric},{kind}"
        errors = [_number(scores.get(f"{metric}_stderr,{kind}")) for scores in (own, other)]
        metrics[label] = MetricResult(
            value=float(value), baseline=float(other[key]), stderr=errors[0], baseline_stderr=errors[1]
        )
    samples = found.get("n-samples", {}).get(name, {}).get("effective")
    version = found.get("versions", {}).get(name)
    return TaskResult(
        metrics=metrics, samples=samples, task_version=None if version is None else str(version), packed_share=share
    )


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not math.isnan(value) else None
