"""Tables for the terminal: every measure keeps its name, however narrow the terminal and however many the recipes."""

from io import StringIO

import pytest
from rich.console import Console

from kvq.report.results import compare_table, eval_table

NAMES = ("fp16", "int8", "int4", "int3", "kivi4", "kivi2")


def shown(table, width):
    stream = StringIO()
    Console(file=stream, width=width, color_system=None).print(table)
    return stream.getvalue()


@pytest.mark.parametrize("width", [80, 160])
@pytest.mark.parametrize("count", [2, 6])
def test_a_comparison_names_every_measure(make_result, width, count):
    results = [make_result(name, 0.01 * i) for i, name in enumerate(NAMES[-count:])]
    results[-1]["results"]["perplexity"]["value"] = 974_073_071_333_119.625
    text = shown(compare_table(results), width)
    for word in ("perplexity", "arc_easy acc", "gsm8k exact_match", "top1", "speed tokens/s", "needle choice"):
        assert word in text
    if width == 160:
        assert "9.74e+14 v" in text
        assert all(name in text for name in NAMES[-count:])
    assert "v worse, ^ better" in text


def test_one_result_shows_differences_and_verdicts(make_result):
    text = shown(eval_table(make_result("kivi2", 0.02)), 120)
    for word in ("kivi2", "−10.0 [−18.2, −1.8]", "worse", "same", "unclear", "changes the model noticeably", "stream"):
        assert word in text
