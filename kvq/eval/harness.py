"""lm-eval tasks for recipes and their baseline, on the same requests."""

import contextlib
import functools
import logging
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvq.errors import DataError, suggest
from kvq.eval.evaluated_model import EvaluatedModel
from kvq.eval.identity import answers_key
from kvq.eval.local import LocalTask, local_names, local_task
from kvq.eval.paired import (
    Difference,
    Flips,
    flips,
    jackknife,
    jackknife_difference,
    mean_difference,
    mean_of,
    share_difference,
)
from kvq.eval.result import MetricResult, TaskResult
from kvq.eval.results_cache import Answers
from kvq.eval.settings import Settings
from kvq.eval.task_files import is_group

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """Tasks that were found: lm-eval's manager, the rows of local ones by name, and single tasks' own files."""

    names: tuple[str, ...]
    manager: Any
    local: Mapping[str, LocalTask]
    files: Mapping[str, Path]

    def spec(self, name: str) -> str:
        """What lm-eval finds the task by."""
        return str(self.files.get(name, name))


@contextlib.contextmanager
def find_tasks(
    names: Sequence[str],
    *,
    task_dir: str | Path | None,
    task_data: str | Path | None,
    own: Sequence[str],
    files: Mapping[str, Path] | None = None,
) -> Iterator[Tasks | None]:
    """Find lm-eval tasks by name: those with a file here on the rows of ``task_data``, others in ``task_dir`` alone if
    that is given, else among those that lm-eval ships.

    own     kvq's own tasks, for the suggestion.
    files   task files by the name that they state: these tasks are read from there.

    Raises DataError for an unknown task or a missing folder, and if lm-eval is not installed.
    """
    if not names:
        yield None
        return
    try:
        import datasets
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise DataError(
            f"task {names[0]!r} is none of {', '.join(own)}, and lm-eval is not installed: run "
            "'pip install 'kvq-toolkit[eval]'' for its tasks."
        ) from None
    if task_dir is not None and not Path(task_dir).is_dir():
        raise DataError(f"task folder {str(task_dir)!r} does not exist: give a folder with task files (.yaml).")
    datasets.disable_progress_bars()
    files = files or {}
    with_rows = [name for name in names if name in local_names() and name not in files]
    local = {} if task_data is None else {name: local_task(name, task_data) for name in with_rows}
    with tempfile.TemporaryDirectory(prefix="kvq-tasks-") as folder:
        for task in local.values():
            task.write(Path(folder))
        # The tasks of a group may lie beside its file; the group itself lm-eval finds there by name only.
        groups = {name: file.parent for name, file in files.items() if is_group(file)}
        include = [str(path) for path in (folder, task_dir, *groups.values()) if path is not None]
        # lm-eval's own index takes seconds, so it is read only when a name needs it.
        single = {name: file for name, file in files.items() if name not in groups}
        defaults = task_dir is None and not {*local, *single}.issuperset(names)
        manager = TaskManager(include_path=include, include_defaults=defaults)
        known = [*own, *manager.all_tasks, *files]
        for name in names:
            if name not in known:
                also = local_names() if task_data is None and task_dir is not None else []
                raise DataError(f"unknown task {name!r}.{suggest(name, {*known, *also})}")
        yield Tasks(names=tuple(names), manager=manager, local=local, files=single)


@dataclass(frozen=True, kw_only=True)
class TaskRun:
    """What lm-eval returned, or why the task was refused."""

    found: Mapping[str, Any] | None
    packed_share: float | None
    refused: str | None

    def samples(self, task: str) -> list[Mapping[str, Any]]:
        return self.found["samples"][task]


class Harness:
    """Runs one task at a time under any plan of a model; answers are kept by task and plan."""

    def __init__(self, tasks: Tasks, settings: Settings):
        self.tasks, self.settings = tasks, settings

    def run(self, name: str, evaluated: EvaluatedModel, progress: Callable[[int, int], None] | None) -> TaskRun:
        """Answers of ``evaluated`` under its plan; one that quantizes nothing answers by lm-eval's own code."""
        from kvq.eval.lm_eval import KvqLM, NothingReadError

        settings = self.settings
        # What is not quantized answers alike in every mode.
        mode = settings.mode if evaluated.quantizes else "exact"
        key = answers_key(
            evaluated,
            task=name,
            mode=mode,
            chunk=settings.chunk if mode == "chunked" else None,
            **{field: getattr(settings, field) for field in ("limit", "fewshot", "chat", "batch_size", "seed")},
            data=self._data(name),
        )
        answers = Answers(settings.cache_folder, key)
        model = KvqLM(
            evaluated.model,
            plan=evaluated.plan,
            mode=settings.mode if evaluated.quantizes else "stream",
            chunk=settings.chunk,
            tokenizer=evaluated.tokenizer,
            batch_size=settings.batch_size,
            answers=answers,
            progress=progress,
        )
        try:
            found = self._evaluate(model, name)
        except NothingReadError as error:
            return TaskRun(found=None, packed_share=0.0, refused=str(error))
        finally:
            answers.close()
        return TaskRun(found=found, packed_share=model.packed_share, refused=None)

    def _data(self, name: str) -> Mapping[str, Any] | None:
        return self.tasks.local[name].identity if name in self.tasks.local else None

    def _evaluate(self, model, name: str) -> Mapping[str, Any]:
        import lm_eval

        settings = self.settings
        kinds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
        try:
            with _without_bars():
                return lm_eval.simple_evaluate(
                    model,
                    tasks=[self.tasks.spec(name)],
                    task_manager=self.tasks.manager,
                    limit=settings.limit,
                    num_fewshot=settings.fewshot,
                    apply_chat_template=settings.chat,
                    # Errors are computed here, paired and by the same rule for every metric.
                    bootstrap_iters=0,
                    log_samples=True,
                    **dict.fromkeys(kinds, settings.seed),
                )
        except DataError:
            raise
        except (FileNotFoundError, ConnectionError, KeyError, ValueError) as error:
            why = (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(".")
            raise DataError(f"task {name!r} cannot be set up: {why}; check the task file and its data.") from None

    def pair(self, name: str, run: TaskRun, base: TaskRun) -> dict[str, TaskResult]:
        """Results of a task, or of a group, where its tasks give its own numbers, and of each of its tasks; by name."""
        if run.refused is not None:
            return {name: self._result(name, run, base, "likelihood", {}, len(base.found["samples"].get(name, ())))}
        leaves = self.tasks.manager.load([self.tasks.spec(name)])["tasks"]
        parts = {leaf: {leaf: task} for leaf, task in leaves.items()}
        if len(leaves) > 1 and name in run.found["results"]:
            parts = {name: leaves} | parts
        return {part: self._pair(part, members, run, base) for part, members in parts.items()}

    def _pair(self, name: str, leaves: Mapping[str, Any], run: TaskRun, base: TaskRun) -> TaskResult:
        """Metrics over the documents of all these tasks."""
        own, other = ([row for leaf in leaves for row in found.samples(leaf)] for found in (run, base))
        task = next(iter(leaves.values()))
        metrics = _metrics(name, task, own, other, run.found["results"][name], base.found["results"][name])
        kind = "generation" if task.OUTPUT_TYPE == "generate_until" else "likelihood"
        asked = sum(len({row["doc_id"] for row in run.samples(leaf)}) for leaf in leaves)
        return self._result(name, run, base, kind, metrics, asked)

    def _result(self, name: str, run: TaskRun, base: TaskRun, kind: str, metrics, samples: int) -> TaskResult:
        return TaskResult(
            kind=kind,
            mode="prefill" if kind == "generation" else self.settings.mode,
            metrics=metrics,
            samples=samples,
            task_version=str(base.found["versions"].get(name, "")) or None,
            packed_share=run.packed_share,
            fewshot=base.found["n-shot"].get(name),
            data=self._data(name),
            refused=run.refused,
        )


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """lm-eval draws a bar for every task it sets up, and has no switch for that."""
    import lm_eval.api.task as module

    drawn, module.tqdm = module.tqdm, functools.partial(module.tqdm, disable=True)
    try:
        yield
    finally:
        module.tqdm = drawn


def _metrics(
    name: str,
    task,
    own: Sequence[Mapping[str, Any]],
    other: Sequence[Mapping[str, Any]],
    scores: Mapping[str, Any],
    base: Mapping[str, Any],
) -> dict[str, MetricResult]:
    """Every metric paired by document."""
    identity = ("doc_id", "filter", "doc_hash", "prompt_hash", "target_hash")
    if [[row[key] for key in identity] for row in own] != [[row[key] for key in identity] for row in other]:
        raise DataError(f"task {name!r} did not ask baseline and recipe the same: its documents or prompts differ.")
    higher, aggregation, found = task.higher_is_better(), task.aggregation(), {}
    for key, value in scores.items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        columns = [[row[metric] for row in rows if row["filter"] == kind and metric in row] for rows in (own, other)]
        statistic = aggregation.get(metric)
        if statistic is None or not all(columns) or not _gives(statistic, columns[0], value):
            logger.warning("metric %s of task %s has no number a document and is left out.", metric, name)
            continue
        difference, own_flips = _difference(*columns, statistic)
        errors = [
            (mean_of(column) if _is_mean(statistic, column) else jackknife(column, statistic)).stderr
            for column in columns
        ]
        found[metric if kind == "none" else f"{metric},{kind}"] = MetricResult.of(
            float(value),
            float(base[key]),
            difference,
            higher_is_better=bool(higher.get(metric, True)),
            stderr=errors[0],
            baseline_stderr=errors[1],
            flips=own_flips,
        )
    return found


def _difference(values: list, baseline: list, statistic: Callable[[list], float]) -> tuple[Difference, Flips | None]:
    """The paired difference that suits the numbers, and the flips of answers that are right or wrong."""
    if not (_is_mean(statistic, values) and _is_mean(statistic, baseline)):
        return jackknife_difference(values, baseline, statistic), None
    if all(value in (0, 1) for value in (*values, *baseline)):
        return share_difference(values, baseline), flips(values, baseline)
    return mean_difference(values, baseline), None


def _is_mean(statistic: Callable[[list], float], values: list) -> bool:
    plain = all(isinstance(value, int | float) for value in values)
    return plain and _gives(statistic, values, math.fsum(values) / len(values))


def _gives(statistic: Callable[[list], float], values: list, expected: float) -> bool:
    try:
        return math.isclose(statistic(values), expected, rel_tol=1e-9, abs_tol=1e-12)
    except (TypeError, ValueError, ZeroDivisionError):
        return False
