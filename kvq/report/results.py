"""Results of evaluations as rich tables."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.table import Column, Table

from kvq.eval.paired import BETTER, SAME, UNCLEAR, WORSE
from kvq.report.rows import Row, names_of, number, rows_of, side_by_side
from kvq.report.tables import new_table
from kvq.report.verdict import overall, question, verdict_of

# A terminal is narrow.
_WORDS = {UNCLEAR: "unclear"}
_MARKS = {WORSE: " v", BETTER: " ^", SAME: " ="}


def eval_table(result: Mapping[str, Any]) -> Group:
    """One result: every measure beside the baseline's, the paired difference with its 95% interval, and the verdict."""
    rows = rows_of(result)
    cells = [
        (_label(row), row.baseline, row.value, row.difference, _WORDS.get(row.verdict, row.verdict)) for row in rows
    ]
    title = f"{result['model']}, mode {result['mode']}"
    table = _table(title, ("baseline", result["recipe"]["name"], "difference [95%]", Column("")), cells, [result])
    legend = ["unclear: too few samples to tell."] if any(row.verdict == UNCLEAR for row in rows) else []
    return Group(table, *_notes(rows), *legend, *_sentences(result))


def compare_table(results: Sequence[Mapping[str, Any]]) -> Group:
    """Several results beside one baseline: values, and the verdicts on their differences."""
    names = names_of(results)
    cells = (
        (label, baseline, *(_marked(own) if own else "-" for own in found))
        for label, (baseline, found) in side_by_side(results, _label).items()
    )
    table = _table("Compared on the same requests", ("baseline", *names), cells, results)
    legend = "Paired differences: v worse, ^ better, = the same; without a mark: too few samples to tell."
    sentences = [own for own in (overall(names, results), *(verdict_of(result).headline for result in results)) if own]
    return Group(table, legend, *dict.fromkeys(sentences), *dict.fromkeys(question(result) for result in results))


def _label(row: Row) -> str:
    return row.name if row.task == "divergence" else f"{row.task} {row.name}".rstrip()


def _marked(row: Row) -> str:
    return f"{row.value.split(' ± ')[0]}{_MARKS.get(row.verdict, '')}"


def _notes(rows: Sequence[Row]) -> list[str]:
    """What must be known about tasks, one line each; the text tasks need none."""
    notes: dict[str, str] = {}
    for row in rows:
        if row.note and row.task not in ("perplexity", "divergence"):
            notes.setdefault(row.task, row.note)
    return [f"{task}: {note}" for task, note in notes.items()]


def _table(title: str, columns: Sequence[str | Column], rows: Iterable[Sequence[str]], results) -> Table:
    """Rows of measures, and the size of every result below them."""
    bits = (number(result["bits_per_element"], 2) for result in results)
    last = (f"bits at {results[0]['bits_tokens']:,} tokens", "16", *bits)
    # Where a terminal is too narrow for all, numbers wrap and names stay: a number without a name says nothing.
    return new_table(title, Column("measure", no_wrap=True, min_width=18), *columns, rows=[*rows, last])


def _sentences(result: Mapping[str, Any]) -> list[str]:
    verdict = verdict_of(result)
    windows = f"{result['windows']} windows of {result['seq_len']:,} tokens; " if result["windows"] else ""
    how = f"{windows}baseline: {result['baseline']}; {result['implementation']}; computed in {result['dtype']}."
    return [verdict.headline, *verdict.points, how, question(result)]
