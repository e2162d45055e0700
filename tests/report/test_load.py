"""Result files: which are read, what is refused, and which results are shown as one."""

import json

import pytest

from kvq.errors import CheckpointError
from kvq.report.load import commands_of, differences, joined, load_results


def write(folder, data, name="result.json"):
    file = folder / name
    file.write_text(json.dumps(data))
    return file


def test_single_and_compared_results_are_read_in_their_order(make_result, tmp_path):
    one = write(tmp_path, make_result("kivi4"), "one.json")
    two = write(tmp_path, {"schema_version": 2, "runs": [make_result("int4"), make_result("kivi2")]}, "two.json")
    assert [run["recipe"]["name"] for run in load_results([one, two])] == ["kivi4", "int4", "kivi2"]


@pytest.mark.parametrize(
    ("data", "says"),
    [([], "no result of kvq"), ({"a": 1}, "no result of kvq"), ({"schema_version": 1}, "schema 1")],
)
def test_other_files_are_refused(tmp_path, data, says):
    with pytest.raises(CheckpointError, match=says):
        load_results([write(tmp_path, data)])


def test_unreadable_and_incomplete_files_are_named(make_result, tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.json"):
        load_results([tmp_path / "none.json"])
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(CheckpointError, match="no JSON"):
        load_results([broken])
    result = make_result()
    del result["hashes"]
    with pytest.raises(CheckpointError, match="lacks 'hashes'"):
        load_results([write(tmp_path, result)])


def split(result):
    """The result as two runs would have given it: one on the text, one with questions."""
    tasks = result["results"]
    text = {name: tasks[name] for name in ("perplexity", "divergence")}
    asked = {name: found for name, found in tasks.items() if name not in text}
    nothing = {"data": None, "windows": 0, "tokens": 0, "packed_share": None, "stride": None, "seq_len": 2048}
    return [
        {**result, "results": text, "command": "kvq eval a"},
        {**result, **nothing, "bits_tokens": 2048, "results": asked, "command": "kvq eval b"},
    ]


@pytest.mark.parametrize("order", [1, -1])
def test_runs_of_one_recipe_with_different_tasks_become_one(make_result, order):
    whole = make_result("kivi2")
    found = joined(split(whole)[::order])
    assert len(found) == 1
    assert found[0]["results"] == whole["results"]
    assert {name: value for name, value in found[0].items() if name not in ("results", "command")} == {
        name: value for name, value in whole.items() if name not in ("results", "command")
    }
    assert commands_of(found) == ["kvq eval a", "kvq eval b"][::order]


@pytest.mark.parametrize(
    "change",
    [
        {"mode": "prefill"},
        {"recipe_hash": "0" * 64},
        {"seed": 1},
        {"dtype": "bfloat16"},
        {"hashes": {"model": "other"}},
        {"versions": {"torch": "2.14"}},
    ],
)
def test_runs_that_differ_stay_apart(make_result, change):
    one, other = split(make_result("kivi2"))
    assert len(joined([one, {**other, **change}])) == 2


def test_no_task_is_shown_twice_or_lost(make_result):
    one, other = split(make_result("kivi2"))
    assert len(joined([one, one, other])) == 2
    partial = {**other, "partial": True, "unfinished": ["drift"]}
    assert joined([one, partial])[0]["partial"]
    assert joined([one, partial])[0]["unfinished"] == ["drift"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"mode": "chunked"}, "different modes"),
        ({"hashes": {"baseline": "other"}}, "different baselines"),
        ({"data": {"sha256": "other"}}, "different texts"),
        ({"windows": 9}, "different windows"),
        ({"dtype": "float16"}, "different precisions"),
    ],
)
def test_what_stands_against_a_comparison_is_said(make_result, change, says):
    one = make_result("kivi4")
    assert differences([one, make_result("kivi2")]) == []
    assert any(says in line for line in differences([one, {**make_result("kivi2"), **change}]))


def test_other_questions_are_named(make_result):
    other = make_result("kivi2")
    other["results"]["arc_easy"] = {**other["results"]["arc_easy"], "samples": 7}
    assert differences([make_result("kivi4"), other]) == ["Not every run was asked the same on arc_easy."]
