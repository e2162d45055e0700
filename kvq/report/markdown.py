"""Results as Markdown, for model cards and pull requests."""

from collections.abc import Mapping, Sequence
from typing import Any

from kvq.report.load import differences
from kvq.report.rows import names_of, rows_of
from kvq.report.verdict import question, verdict_of

BEGIN, END = "<!-- kvq evaluation: begin -->", "<!-- kvq evaluation: end -->"


def markdown_report(results: Sequence[Mapping[str, Any]], heading: str = "## Evaluation") -> str:
    """A section with the verdict, a table of every measure, and the command that repeats it."""
    parts = [heading, *differences(results)]
    for name, result in zip(names_of(results), results):
        verdict = verdict_of(result)
        if len(results) > 1:
            parts.append(f"#{heading.split(' ')[0]} {name}")
        parts.append(f"**{_plain(verdict.headline)}**")
        if verdict.points:
            parts.append("\n".join(f"- {_plain(point)}" for point in verdict.points))
        parts += [_table(result), _how(result)]
    commands = dict.fromkeys(result["command"] for result in results if result["command"])
    if commands:
        parts.append("To repeat it:\n\n```bash\n" + "\n".join(commands) + "\n```")
    return "\n\n".join(parts) + "\n"


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
