"""What a result means, in sentences. Nothing is claimed that its errors do not carry."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvq.errors import listed
from kvq.eval.paired import BETTER, SAME, UNCLEAR, WORSE
from kvq.report.rows import LABELS, MODES, SHARES, metrics_of, name_of, size_of, sizes_of, with_interval

# KL from the baseline in nats a token: rules of thumb, said as such. At 0.005 about one token in a hundred changes its
# most likely successor, at 0.02 two or three, at 0.1 one in seven. A flat model has a small KL and changes many: the
# share of the same most likely tokens has bounds of its own, and the worse of both counts.
GRADES = (
    (0.005, 0.97, "good", "is close to lossless"),
    (0.02, 0.93, "good", "changes little"),
    (0.1, 0.8, "fair", "changes the model noticeably"),
    (float("inf"), 0.0, "poor", "changes the model strongly"),
)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """grade: good, fair, poor, none (nothing to judge by), or exact. headline: one sentence. points: further ones."""

    grade: str
    headline: str
    points: Sequence[str]


def verdict_of(result: Mapping[str, Any]) -> Verdict:
    recipe, results = name_of(result), result["results"]
    points = [*_tasks(results), *_warnings(result)]
    size = size_of(result)
    saved = f"{size.bits:.2f} bits a number at {size.tokens:,} tokens instead of 16"
    if result["asymptotic_bits"] >= 16:
        return Verdict(grade="exact", headline=f"{recipe} quantizes nothing: this is the control.", points=points)
    found = results.get("divergence")
    worse = _with(results, WORSE)
    if found is None:
        headline = _by_tasks(recipe, results, worse, saved)
        return Verdict(grade="poor" if worse else "none", headline=headline, points=points)
    grade, what = _grade(found["kl"], found["top1"])
    if worse and grade == "good":
        grade = "fair"
        what += f" in the next token, but is shown to be worse on {listed(worse)}"
    headline = (
        f"{recipe} {what}: KL {found['kl']:.4f} nats a token, the same most likely token {found['top1']:.1%} of the "
        f"time, at {saved}."
    )
    return Verdict(grade=grade, headline=headline, points=points)


def _grade(kl: float, top1: float) -> tuple[str, str]:
    """The first grade whose bounds of both hold; the last one for what is no number."""
    found = ((grade, what) for limit, same, grade, what in GRADES if kl < limit and top1 >= same)
    return next(found, GRADES[-1][2:])


def overall(names: Sequence[str], results: Sequence[Mapping[str, Any]]) -> str:
    """One sentence on several results: which of them no other one beats in size and in error. Empty if errors were not
    measured, or of one result that quantizes."""
    points = sorted(
        (size.bits, found["kl"], name)
        for name, result, size in zip(names, results, sizes_of(results))
        if result["asymptotic_bits"] < 16 and (found := result["results"].get("divergence"))
    )
    if len(points) < 2:
        return ""
    best = pareto(points)
    each = "; ".join(f"{name} ({bits:.2f} bits, KL {kl:.4f})" for bits, kl, name in best)
    if len(best) == len(points):
        return f"Each of these trades size for error: {each}."
    one = len(best) == 1
    return (
        f"Nothing here is both smaller and closer to the baseline than {'this one' if one else 'any of these'}: {each}."
    )


def pareto(points: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Of points (size, error, name) in rising order, those that no other one beats in both numbers."""
    return [own for i, own in enumerate(points) if all(own[1] < other[1] for other in points[:i])]


def _by_tasks(recipe: str, results: Mapping[str, Any], worse: Sequence[str], saved: str) -> str:
    """The headline where there is no divergence to judge by."""
    unclear, same = _with(results, UNCLEAR), _with(results, SAME, BETTER)
    if worse:
        return f"{recipe} is shown to be worse on {listed(worse)}, at {saved}."
    if unclear:
        return f"Too few samples to tell whether {recipe} is worse on {listed(unclear)}, at {saved}."
    if same:
        return f"{recipe} answers as the baseline does on {listed(same)}, at {saved}."
    return f"{recipe}: nothing here measures its quality, at {saved}."


# Counted up to where a recipe leaves the baseline: by definition never better, and worse for whatever changes a token.
DRIFT = "drift"


def _with(results: Mapping[str, Any], *verdicts: str) -> list[str]:
    """Tasks whose main metric got one of these verdicts; drift, which is no score, aside."""
    mains = {task: _main(found) for task, found in results.items() if task != DRIFT}
    return [task for task, main in mains.items() if main and main[1]["verdict"] in verdicts]


def _main(found: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
    """A task's first metric."""
    return next(iter(metrics_of(found).items()), None) if isinstance(found, Mapping) else None


def _tasks(results: Mapping[str, Any]) -> list[str]:
    groups: dict[str, list[str]] = {}
    refused, weak = [], []
    for task, found in results.items():
        if found.get("refused"):
            refused.append(f"Not measured: {task}, because {found['refused'].rstrip('.')}.")
            continue
        main = _main(found)
        if main is None:
            continue
        if found["weak"]:
            weak.append(task)
            continue
        name, metric = main
        if task == DRIFT:
            drift = f"Greedy text leaves the baseline's after {metric['value']:.0f} of {metric['baseline']:.0f} tokens"
            refused.append(f"{drift} on average, {found['samples']} texts.")
            continue
        share = name.split(",")[0] in SHARES
        shown = with_interval(
            metric["difference"], metric["low"], metric["high"], 1 if share else 3, 100 if share else 1
        )
        unit = " points" if share else f" {LABELS.get(name, name)}"
        groups.setdefault(metric["verdict"], []).append(f"{task} ({shown}{unit})")
    said = [
        f"{what}: {'; '.join(groups[verdict])}."
        for verdict, what in (
            (WORSE, "Shown to be worse"),
            (BETTER, "Shown to be better"),
            (SAME, "Every answer the same"),
            (UNCLEAR, "Too few samples to tell"),
        )
        if verdict in groups
    ]
    if weak:
        them = "them" if weak[1:] else "it"
        said.append(f"The baseline itself cannot do {listed(weak)}, so nothing follows from {them}.")
    return said + refused


def _warnings(result: Mapping[str, Any]) -> list[str]:
    said = []
    if result["partial"]:
        missing = f" Missing: {listed(result['unfinished'])}." if result["unfinished"] else ""
        said.append(f"The run was interrupted; the text covers {result['windows']} windows.{missing}")
    if result["mode"] == "simulate":
        said.append("Mode simulate quantizes every number, also those that decoding would keep exact.")
    divergence = result["results"].get("divergence")
    if divergence is not None and divergence["windows"] < 4:
        said.append(f"The text has {divergence['windows']} windows: errors are rough; raise --limit.")
    return said


def question(result: Mapping[str, Any]) -> str:
    """What the numbers answer, by mode; generation always reads an exact prompt."""
    text = f"Mode {result['mode']}: scored tokens read {MODES[result['mode']]}."
    generated = [task for task, found in result["results"].items() if found.get("kind") == "generation"]
    if generated and result["mode"] != "prefill":
        text += f" {listed(generated)}: written through the packed cache after an exact prompt (mode prefill)."
    return text
