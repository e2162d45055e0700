"""Results of evaluations as rich tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table

from kvq.report.rows import names_of, number, rows_of
from kvq.report.verdict import question, verdict_of


def eval_table(result: Mapping[str, Any]) -> Group:
    """One result: every measure beside the baseline's, the paired difference with its 95% interval, and the verdict."""
    table = _table(
        f"{result['model']}, mode {result['mode']}",
        ("task", "measure"),
        ("baseline", result["recipe"]["name"], "difference [95%]"),
        ("verdict", "note"),
    )
    last = None
    for row in rows_of(result):
        task = row.task if row.task != last else ""
        table.add_row(task, row.measure, row.baseline, row.value, row.difference, row.verdict, row.note)
        last = row.task
    bits = number(result["bits_per_element"], 2)
    table.add_row("memory", f"bits per element at {result['bits_tokens']:,} tokens", "16", bits, "", "", "")
    return Group(table, *_sentences(result))


def compare_table(results: Sequence[Mapping[str, Any]]) -> Group:
    """Several results beside one baseline: values, and the verdicts on their differences."""
    names = names_of(results)
    table = _table("Compared on the same requests", ("task", "measure"), ("baseline", *names), ())
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for name, result in zip(names, results):
        for row in rows_of(result):
            rows.setdefault((row.task, row.measure), {})[name] = row
    last = None
    for (task, measure), found in rows.items():
        baseline = next(iter(found.values())).baseline
        cells = [_cell(found[name]) if name in found else "-" for name in names]
        table.add_row(task if task != last else "", measure, baseline, *cells)
        last = task
    bits = [number(result["bits_per_element"], 2) for result in results]
    table.add_row("memory", f"bits per element at {results[0]['bits_tokens']:,} tokens", "16", *bits)
    legend = "A mark says what the paired difference shows: v worse, ^ better, = same; none: too few samples to tell."
    return Group(table, legend, *dict.fromkeys(line for result in results for line in _sentences(result, short=True)))


def _cell(row) -> str:
    mark = {"worse": " v", "better": " ^", "same": " ="}.get(row.verdict, "")
    return f"{row.value or row.measure}{mark}"


def _table(title: str, left: Sequence[str], right: Sequence[str], last: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for columns, justify in ((left, "left"), (right, "right"), (last, "left")):
        for column in columns:
            table.add_column(column, justify=justify)
    return table


def _sentences(result: Mapping[str, Any], short: bool = False) -> list[str]:
    verdict = verdict_of(result)
    windows = f"{result['windows']} windows of {result['seq_len']:,} tokens; " if result["windows"] else ""
    how = (
        f"{windows}baseline: {result['baseline']}; {result['implementation']}; computed in {result['dtype']}. "
        + question(result)
    )
    return [verdict.headline] if short else [verdict.headline, *verdict.points, how]
