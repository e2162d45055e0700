"""Results as rows of plain text: what terminal, page and model card all show, in one place.

Everything arrives as the plain data of ``EvalResult.to_dict()``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MINUS = "\u2212"
# Numbers from here on are written by their power of ten: a broken model's perplexity has no digits that matter.
LARGE = 1e6

# Metrics in points of a hundred; all others keep their unit.
SHARES = ("acc", "acc_norm", "exact_match", "choice", "exact", "copied", "agreement", "f1", "em")
LABELS = {
    "choice": "right answer most likely",
    "exact": "written exactly",
    "copied": "copied before the first error",
    "tokens": "tokens until it leaves the baseline",
    "agreement": "same next token",
    "nll": "loss of the right answer, nats a token",
    "acc": "accuracy",
    "acc_norm": "accuracy, by length",
    "exact_match,strict-match": "exact match, strict",
    "exact_match,flexible-extract": "exact match, flexible",
    "word_perplexity": "perplexity by word",
    "byte_perplexity": "perplexity by byte",
    "bits_per_byte": "bits per byte",
}
MODES = {
    "stream": "what token-by-token decoding would have read",
    "prefill": "an exact prompt, then the packed cache: what a user sees after a prompt",
    "chunked": "text that arrives in chunks, each reading the packed cache of those before it",
    "simulate": "every number quantized, nothing exact: for comparison with papers only",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measure: numbers as text, and the numbers behind the difference for charts.

    name       of the metric, short. measure: what it says, for people.
    verdict    worse, better, same, too few samples to tell, or empty.
    """

    task: str
    name: str
    measure: str
    baseline: str
    value: str
    difference: str = ""
    verdict: str = ""
    note: str = ""
    estimate: float | None = None
    low: float | None = None
    high: float | None = None


def rows_of(result: Mapping[str, Any]) -> list[Row]:
    """Every measure of a result, in the order of its tasks."""
    return [row for task, found in result["results"].items() for row in _rows(task, found)]


def side_by_side(
    results: Sequence[Mapping[str, Any]], name: Callable[[Row], Any]
) -> dict[Any, tuple[str, list[Row | None]]]:
    """Measures by name: the baseline's value, and the row of every result, None where it has none."""
    found: dict[Any, tuple[str, list[Row | None]]] = {}
    for i, result in enumerate(results):
        for row in rows_of(result):
            nothing: list[Row | None] = [None] * len(results)
            found.setdefault(name(row), (row.baseline, nothing))[1][i] = row
    return found


def _rows(task: str, found: Mapping[str, Any]) -> Iterator[Row]:
    if task == "perplexity":
        yield _perplexity(found)
    elif task == "divergence":
        yield from _divergence(found)
    elif task == "speed":
        yield _speed(found)
    elif found.get("refused"):
        yield Row(task=task, name="", measure="not measured", baseline="", value="-", note=found["refused"])
    else:
        yield from _task(task, found)


def _perplexity(found: Mapping[str, Any]) -> Row:
    return Row(
        task="perplexity",
        name="",
        measure="perplexity (difference: loss, nats a token)",
        baseline=number(found["baseline"], 3),
        value=number(found["value"], 3),
        difference=with_interval(found["delta_nll"], found["low"], found["high"], 4),
        verdict=found["verdict"],
        note=f"{found['windows']} windows",
        estimate=found["delta_nll"],
        low=found["low"],
        high=found["high"],
    )


def _divergence(found: Mapping[str, Any]) -> Iterator[Row]:
    def row(name: str, measure: str, baseline: str, value: str, note: str = "") -> Row:
        return Row(task="divergence", name=name, measure=measure, baseline=baseline, value=value, note=note)

    for key, measure in (("kl", "KL from baseline"), ("reverse_kl", "KL to baseline")):
        error = found[f"{key}_stderr"]
        value = number(found[key], 4) + (f" ± {number(error, 4)}" if error is not None else "")
        yield row(key.replace("_", " "), measure, "0", value, "nats a token")
    tail = f"{number(found['kl_p99'], 3)} / {number(found['kl_max'], 3)}"
    yield row("kl p99 / max", "KL: worst 1% begins at / worst token", "0", tail, "nats")
    for key, measure in (("top1", "same most likely token"), ("top5", "baseline's token among the first five")):
        error = found[f"{key}_stderr"]
        value = f"{found[key]:.1%}" + (f" ± {100 * error:.1f}" if error is not None else "")
        yield row(key, measure, "100%", value)


def _speed(found: Mapping[str, Any]) -> Row:
    return Row(
        task="speed",
        name="tokens/s",
        measure=f"decoding, tokens a second at {found['context']:,} tokens",
        baseline=number(found["baseline"], 1),
        value=number(found["tokens_per_second"], 1),
        difference=f"{found['ratio']:.2f}x ({found['ratio_low']:.2f} to {found['ratio_high']:.2f})",
        note=f"{found['implementation']}, {found['threads']} threads",
    )


def _task(task: str, found: Mapping[str, Any]) -> Iterator[Row]:
    for name, metric in metrics_of(found).items():
        share = name.split(",")[0] in SHARES
        scale, digits = (100, 1) if share else (1, 3)
        show = (lambda value: f"{value:.1%}") if share else (lambda value: number(value, 3))
        yield Row(
            task=task,
            name=name,
            measure=LABELS.get(name, name),
            baseline=show(metric["baseline"]),
            value=show(metric["value"]),
            difference=with_interval(metric["difference"], metric["low"], metric["high"], digits, scale),
            verdict=metric["verdict"],
            note=_note(found, metric),
            estimate=metric["difference"],
            low=metric["low"],
            high=metric["high"],
        )


@dataclass(frozen=True, kw_only=True)
class Size:
    """What a recipe's cache takes at one length: ``bits`` a number, where the compared cache has 16."""

    tokens: int
    bits: float


def size_of(result: Mapping[str, Any], tokens: int | None = None) -> Size:
    """The size at ``tokens`` (None: the longest) of a result's memory rows; as measured at the scored length where
    there is no such row."""
    rows = {row["tokens"]: row for row in result["memory"]}
    row = rows.get(max(rows, default=0) if tokens is None else tokens)
    if row is None:
        return Size(tokens=result["bits_tokens"], bits=result["bits_per_element"])
    return Size(tokens=row["tokens"], bits=16 * row["recipe_bytes"] / row["plain_bytes"])


def sizes_of(results: Sequence[Mapping[str, Any]]) -> list[Size]:
    """The sizes of several results at the longest length that all of them have."""
    shared = (
        set.intersection(*({row["tokens"] for row in result["memory"]} for result in results)) if results else set()
    )
    return [size_of(result, max(shared, default=0)) for result in results]


def metrics_of(found: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The metrics of a task's result, by name."""
    return {name: value for name, value in found.items() if isinstance(value, Mapping) and "difference" in value}


def _note(found: Mapping[str, Any], metric: Mapping[str, Any]) -> str:
    notes = [f"{found['samples']:,} asked"]
    if metric.get("flip_rate") is not None:
        notes.append(f"{metric['flip_rate']:.1%} flipped ({metric['lost']} lost, {metric['won']} won)")
    if found["weak"]:
        notes.append("the baseline itself cannot do this")
    if found["packed_share"] is not None and 0 < found["packed_share"] < 0.5:
        notes.append(f"only {found['packed_share']:.0%} of the tokens read quantized ones")
    if found["kind"] == "generation" and found["packed_share"] == 0:
        notes.append("nothing quantized was read")
    return "; ".join(notes)


def number(value: float | None, digits: int) -> str:
    if value is None:
        return "-"
    if value and abs(value) < 10**-digits / 2:
        return f"{value:.1e}".replace("-", MINUS, 1) if value < 0 else f"{value:.1e}"
    if abs(value) >= LARGE:
        return signed(f"{value:.3g}")
    return signed(f"{value:,.{digits}f}")


def signed(text: str) -> str:
    return text.replace("-", MINUS, 1) if text.startswith("-") else text


def with_interval(value: float, low: float | None, high: float | None, digits: int, scale: float = 1) -> str:
    """'+1.2 [0.3, 2.1]', or without the interval where no error is known."""
    form = f".{digits}f" if abs(scale * value) < LARGE else ".3g"
    text = signed(f"{scale * value:+{form}}")
    if low is None or high is None:
        return text
    bounds = (signed(f"{scale * bound:{form if abs(scale * bound) < LARGE else '.3g'}}") for bound in (low, high))
    return f"{text} [{', '.join(bounds)}]"


def name_of(result: Mapping[str, Any]) -> str:
    return result["recipe"]["name"]


def names_of(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for every result, by recipe; told apart by model and mode where recipes agree."""
    names = [name_of(result) for result in results]
    for parts in (("mode",), ("model",), ("model", "mode")):
        if len(set(names)) == len(names):
            break
        names = [
            f"{name_of(result)} ({', '.join(str(result[part]) for part in parts)})" if names.count(name) > 1 else name
            for name, result in zip(names, results)
        ]
    if len(set(names)) < len(names):
        names = [f"{name} #{i}" for i, name in enumerate(names, start=1)]
    return names
