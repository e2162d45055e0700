"""Requirements on a result, such as ``kl<0.02``: for continuous integration.

A requirement is met only if its one-sided 95% bound is: what may be luck is not a pass. One that the estimate meets and
the bound does not is undecided, and counts as not met; more samples decide it.

    kl, reverse_kl, kl_p99, kl_max, top1, top5      of the divergence
    perplexity, perplexity.ratio, delta_nll         of the perplexity (ratio: recipe / baseline)
    TASK, TASK.METRIC                               the recipe's score: the first metric, or the named one
    TASK.drop, TASK.METRIC.drop                     how much worse than the baseline it is, paired
    bits                                            measured bits per element
    speed.ratio                                     decoding speed / that of an ordinary cache
"""

import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvq.errors import DataError, suggest
from kvq.eval.paired import Difference

_FORM = re.compile(r"\s*([A-Za-z_][\w.,-]*?)\s*(<=|>=|<|>)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*")
_COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_DIVERGENCE = ("kl", "reverse_kl", "kl_p99", "kl_max", "top1", "top5")
_PERPLEXITY = ("perplexity", "delta_nll")


@dataclass(frozen=True, kw_only=True)
class Requirement:
    """``name`` compared with ``limit``; text: as it was written."""

    text: str
    name: str
    comparison: str
    limit: float

    @property
    def task(self) -> str | None:
        """The task that must run for it; None: none."""
        if self.name in _DIVERGENCE:
            return "divergence"
        if self.name in _PERPLEXITY or self.name == "perplexity.ratio":
            return "perplexity"
        return None if self.name == "bits" else self.name.split(".")[0]


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """holds: the requirement is met. why: one sentence with the number and its bound."""

    requirement: str
    holds: bool
    why: str


def parse_requirement(text: str, tasks: Sequence[str]) -> Requirement:
    """Read ``NAME<NUMBER`` or the like; ``tasks`` will run. Raises DataError for anything else."""
    match = _FORM.fullmatch(text)
    if match is None:
        raise DataError(f"requirement {text!r} is not understood: write NAME<NUMBER or NAME>NUMBER, such as 'kl<0.02'.")
    name, comparison, limit = match.groups()
    found = Requirement(text=text.strip(), name=name, comparison=comparison, limit=float(limit))
    if found.task is not None and found.task not in tasks:
        known = {*tasks, *_DIVERGENCE, *_PERPLEXITY, "bits"}
        raise DataError(
            f"requirement {text!r} needs the task {found.task!r}, which does not run: add it to --tasks."
            + (suggest(name, known) if "." not in name else "")
        )
    return found


def judge(requirement: Requirement, result: Mapping[str, Any]) -> Judgement:
    """Judge a result (``EvalResult.to_dict()``). Raises DataError if it has no such number."""
    estimate, what = _estimate(requirement.name, result)
    compare, limit = _COMPARE[requirement.comparison], requirement.limit
    bound = estimate.interval(one_sided=True)[1 if requirement.comparison.startswith("<") else 0]
    value, spread = f"{requirement.name} is {estimate.value:.4g}", _spread(estimate, what)
    if compare(bound, limit):
        return Judgement(requirement=requirement.text, holds=True, why=f"{value}, 95% bound {bound:.4g}")
    why = f"{value}{spread}"
    if compare(estimate.value, limit):
        why = f"too few samples to tell: {why}, and its 95% bound is {bound:.4g}"
    return Judgement(requirement=requirement.text, holds=False, why=why)


def _spread(estimate: Difference, what: str) -> str:
    if not what:
        return ""
    if estimate.stderr is None:
        return f" from {estimate.units} of the {what}, so its error is unknown"
    return f" ± {estimate.stderr:.4g} over {estimate.units} {what}"


def _estimate(name: str, result: Mapping[str, Any]) -> tuple[Difference, str]:
    """The number with its error, and what the error was taken over; empty for a number without an error of its own."""
    if name == "bits":
        return _point(result["bits_per_element"])
    task, _, rest = name.partition(".")
    if name in _DIVERGENCE or name in _PERPLEXITY:
        task = "divergence" if name in _DIVERGENCE else "perplexity"
    if task not in result["results"]:
        raise DataError(f"requirement on {name!r} cannot be judged: task {task!r} has no result.")
    found = result["results"][task]
    if name in ("perplexity", "speed.ratio"):
        return _point(found["value" if name == "perplexity" else "ratio_low"])
    if name == "perplexity.ratio":
        ratio, error = math.exp(found["delta_nll"]), found["delta_nll_stderr"]
        error = None if error is None else ratio * error
        return Difference(value=ratio, stderr=error, units=found["windows"]), "windows"
    if name in _DIVERGENCE or name in _PERPLEXITY:
        if f"{name}_stderr" not in found:
            return _point(found[name])
        return Difference(value=found[name], stderr=found[f"{name}_stderr"], units=found["windows"]), "windows"
    return _metric(name, rest, found)


def _metric(name: str, rest: str, found: Mapping[str, Any]) -> tuple[Difference, str]:
    """``rest``: METRIC, drop, METRIC.drop, or empty for the first metric."""
    drop = rest == "drop" or rest.endswith(".drop")
    wanted = rest.removesuffix("drop").rstrip(".") if drop else rest
    metrics = {key: value for key, value in found.items() if isinstance(value, Mapping) and "difference" in value}
    if found.get("refused"):
        raise DataError(f"requirement on {name!r} cannot be judged: {found['refused']}")
    if not metrics or (wanted and wanted not in metrics):
        raise DataError(f"task {name.partition('.')[0]!r} has no metric {wanted!r}.{suggest(wanted, metrics)}")
    metric = metrics[wanted or next(iter(metrics))]
    if not drop:
        return Difference(value=metric["value"], stderr=metric["stderr"], units=found["samples"] or 1), "documents"
    worse = metric["difference"] * (-1 if metric["higher_is_better"] else 1)
    return Difference(value=worse, stderr=metric["difference_stderr"], units=metric["units"]), "paired samples"


def _point(value: float) -> tuple[Difference, str]:
    return Difference(value=value, stderr=0.0, units=2), ""
