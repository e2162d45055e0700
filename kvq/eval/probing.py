"""Run kvq's own tasks with questions: the same passages under the baseline and every plan, paired by passage."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean

from kvq.cache import CachePlan
from kvq.eval.continuations import score_continuations
from kvq.eval.paired import Difference, flips, mean_difference, mean_of, share_difference
from kvq.eval.probes.base import Outcome, Passage, Probe, outcomes
from kvq.eval.result import Cell, MetricResult, TaskResult
from kvq.eval.results_cache import Answers

# By metric: is more better?
HIGHER_IS_BETTER = {"choice": True, "exact": True, "copied": True, "tokens": True, "agreement": True, "nll": False}
_SHARES = ("choice", "exact")


def ask(model, plan: CachePlan | None, passages: Sequence[Passage], answers: Answers, **how) -> list[list[Outcome]]:
    """Outcomes of every passage's questions, a passage a forward. ``how``: as for ``score_continuations``."""
    scores = score_continuations(model, plan, [passage.question for passage in passages], answers=answers, **how)
    return [outcomes(passage, own) for passage, own in zip(passages, scores)]


def pair(
    probe: Probe,
    found: Sequence[Sequence[Outcome]],
    base: Sequence[Sequence[Outcome]],
    *,
    mode: str,
    quantizes: bool,
    data: Mapping[str, object],
) -> TaskResult:
    """The probe's result. Questions about one passage are not independent, so errors are taken over passages."""
    own, other = ([outcome for row in rows for outcome in row] for rows in (found, base))
    share = sum(outcome.packed for outcome in own) / sum(outcome.scored for outcome in own)
    facts = {
        "kind": "likelihood",
        "mode": mode,
        "samples": len(own),
        "task_version": probe.version,
        "packed_share": share,
        "data": data,
        "chance": probe.chance or None,
    }
    if quantizes and not share:
        return TaskResult(
            metrics={}, refused="no answer read a quantized token: ask about longer texts (--lengths).", **facts
        )
    metrics = {name: _metric(name, found, base) for name in probe.metrics}
    main = probe.metrics[0]
    return TaskResult(
        metrics=metrics, weak=_is_weak(main, other, probe.chance), cells=_cells(probe, own, other), **facts
    )


def _metric(name: str, found: Sequence[Sequence[Outcome]], base: Sequence[Sequence[Outcome]]) -> MetricResult:
    columns = [[[float(getattr(outcome, name)) for outcome in row] for row in rows] for rows in (found, base)]
    means = [[fmean(row) for row in rows] for rows in columns]
    flat = [[value for row in rows for value in row] for rows in columns]
    errors = [mean_of(rows).stderr for rows in means]
    difference, own_flips = replace(mean_difference(*means), identical=flat[0] == flat[1]), None
    if name in _SHARES:
        own_flips = flips(*flat)
        single = share_difference(*flat)
        # One question a passage is a paired share. Of several, the passages' means say too little where answers change
        # in both directions, or not at all: the wider interval counts.
        if all(len(row) == 1 for rows in columns for row in rows) or _width(single) > _width(difference):
            difference = single
    return MetricResult.of(
        fmean(flat[0]),
        fmean(flat[1]),
        difference,
        higher_is_better=HIGHER_IS_BETTER[name],
        stderr=errors[0],
        baseline_stderr=errors[1],
        flips=own_flips,
    )


def _width(difference: Difference) -> float:
    low, high = difference.interval()
    return high - low


def _is_weak(name: str, base: Sequence[Outcome], chance: float) -> bool:
    """True if the baseline does not do better than guessing by more than chance explains, or hardly does the task."""
    values = [float(getattr(outcome, name)) for outcome in base]
    if not chance:
        return fmean(values) < 0.1
    return fmean(values) - chance < 1.645 * (chance * (1 - chance) / len(values)) ** 0.5


def _cells(probe: Probe, own: Sequence[Outcome], other: Sequence[Outcome]) -> tuple[Cell, ...]:
    groups: dict[tuple, list[int]] = {}
    for i, outcome in enumerate(own):
        groups.setdefault(tuple(outcome.labels[label] for label in probe.cells), []).append(i)
    return tuple(
        Cell(
            labels=dict(zip(probe.cells, labels)),
            questions=len(members),
            metrics={
                name: tuple(fmean(float(getattr(rows[i], name)) for i in members) for rows in (own, other))
                for name in probe.metrics
            },
        )
        for labels, members in groups.items()
    )
