"""Markdown for model cards: every measure in a table that is one, and a section that is replaced, not repeated."""

import pytest

from kvq.report.markdown import BEGIN, END, markdown_report, with_section
from kvq.report.rows import rows_of


def tables(text):
    """Tables as lists of rows of cells."""
    found, last = [], False
    for line in text.splitlines():
        if line.startswith("|"):
            if not last:
                found.append([])
            found[-1].append([cell.strip() for cell in line.replace("\\|", "¦").strip("|").split("|")])
        last = line.startswith("|")
    return found


def test_every_measure_has_a_row(make_result):
    result = make_result("kivi2")
    text = markdown_report([result])
    (table,) = tables(text)
    assert len({len(row) for row in table}) == 1
    assert len(table) == 2 + len(rows_of(result))
    assert "kvq eval tiny --recipe kivi2" in text
    assert "3.30 bits per element are measured at 256 tokens" in text


def test_several_results_begin_with_a_table_of_all(make_result):
    results = [make_result("fp16", 0.0), make_result("kivi4", 0.004), make_result("kivi2", 0.06)]
    summary, *others = tables(markdown_report(results))
    assert len(others) == 3
    assert [row[0] for row in summary[2:]] == ["baseline", "fp16", "kivi4", "kivi2"]
    assert len({len(row) for row in summary}) == 1
    columns = dict(zip(summary[0], summary[-1]))
    assert columns["bits"] == "3.30"
    assert columns["kl"] == "0.0600"
    assert columns["arc_easy"] == "56.7%"


def test_signs_of_markdown_stay_what_they_are(make_result):
    result = make_result("kivi2")
    result["results"]["a|b*c"] = result["results"]["arc_easy"]
    (table,) = tables(markdown_report([result]))
    assert len({len(row) for row in table}) == 1
    assert "a\\|b\\*c" in markdown_report([result])


@pytest.mark.parametrize("card", ["# Name\n\nText\n", "# Name\n\nText\n\n## Provenance\n\nFrom here\n"])
def test_a_section_is_put_in_once(card):
    once = with_section(card, "## Evaluation\n\none")
    again = with_section(once, "## Evaluation\n\ntwo")
    assert once.count(BEGIN) == again.count(BEGIN) == again.count(END) == 1
    assert "one" in once
    assert "one" not in again
    assert "two" in again
    assert again.replace("two", "one") == once
    if "Provenance" in card:
        assert again.index("## Evaluation") < again.index("## Provenance")
        assert again.endswith("From here\n")
