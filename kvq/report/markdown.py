"""Results as Markdown, for model cards and pull requests."""

from collections.abc import Mapping, Sequence
from typing import Any

from kvq.report.load import commands_of, differences
from kvq.report.rows import names_of, rows_of
from kvq.report.verdict import overall, question, verdict_of

BEGIN, END = "<!-- kvq evaluation: begin -->", "<!-- kvq evaluation: end -->"


def markdown_report(results: Sequence[Mapping[str, Any]], heading: str = "## Evaluation") -> str:
    """A section with the verdict, a table of every measure, and the command that repeats it."""
    names = names_of(results)
    parts = [heading, *differences(results)]
    if best := overall(names, results):
        parts += [f"**{_plain(best)}**", _summary(names, results)]
    for name, result in zip(names, results):
        verdict = verdict_of(result)
        if len(results) > 1:
            parts.append(f"#{heading.split(' ')[0]} {name}")
        parts.append(f"**{_plain(verdict.headline)}**")
        if verdict.points:
            parts.append("\n".join(f"- {_plain(point)}" for point in verdict.points))
        parts += [_table(result), _how(result)]
    commands = commands_of(results)
    if commands:
        parts.append("To repeat it:\n\n```bash\n" + "\n".join(commands) + "\n```")
    return "\n\n".join(parts) + "\n"


def _summary(names: Sequence[str], results: Sequence[Mapping[str, Any]]) -> str:
    """One line a result: size, and the main score of every task."""
    columns = {}
    for result in results:
        for row in rows_of(result):
            if row.value and row.name not in ("reverse kl", "kl p99 / max", "top5"):
                columns.setdefault(row.task if row.task != "divergence" else row.name, row.baseline)
    lines = [f"| recipe | bits | {' | '.join(columns)} |", f"| --- | ---: |{' ---: |' * len(columns)}"]
    lines.append(f"| baseline | 16 | {' | '.join(columns.values())} |")
    for name, result in zip(names, results):
        found: dict[str, str] = {}
        for row in rows_of(result):
            found.setdefault(row.task if row.task != "divergence" else row.name, row.value.split(" ± ")[0])
        cells = (found.get(column, "-") for column in columns)
        lines.append(f"| {_plain(name)} | {result['bits_per_element']:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _table(result: Mapping[str, Any]) -> str:
    lines = ["| task | measure | baseline | recipe | difference [95%] | |", "| --- | --- | ---: | ---: | ---: | --- |"]
    for row in rows_of(result):
        cells = (row.task, row.measure, row.baseline, row.value, row.difference, row.verdict or row.note)
        lines.append("| " + " | ".join(_plain(cell) for cell in cells) + " |")
    return "\n".join(lines)


def _how(result: Mapping[str, Any]) -> str:
    text = ""
    if result["windows"]:
        text = f"{result['windows']} windows of {result['seq_len']:,} tokens of {result['data']['source']}. "
    bits = f"{result['bits_per_element']:.2f} bits per element are measured at {result['bits_tokens']:,} tokens. "
    return _plain(text + bits + question(result))


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    for sign in ("\\", "|", "*", "<"):
        text = text.replace(sign, f"\\{sign}")
    return text.replace("\n", " ")


def with_section(card: str, section: str) -> str:
    """A card with the section between marks: in place of an earlier one, else before ``## Provenance``, else last."""
    block = f"{BEGIN}\n{section.strip()}\n{END}\n"
    if BEGIN in card and END in card:
        head, rest = card.split(BEGIN, 1)
        return head + block + rest.split(END, 1)[1].removeprefix("\n")
    mark = "\n## Provenance\n"
    if mark in card:
        head, rest = card.split(mark, 1)
        return f"{head}\n{block}{mark}{rest}"
    return f"{card.rstrip()}\n\n{block}"
