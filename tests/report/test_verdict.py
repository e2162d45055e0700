"""What is said of a result: nothing that its errors do not carry, and everything a reader must know."""

import pytest

from kvq.report.html import html_report
from kvq.report.verdict import overall, question, verdict_of


@pytest.mark.parametrize(
    ("kl", "grade", "says"),
    [
        (0.001, "good", "close to lossless"),
        (0.01, "good", "changes little"),
        (0.05, "fair", "noticeably"),
        (0.5, "poor", "strongly"),
    ],
)
def test_the_headline_follows_the_divergence(make_result, kl, grade, says):
    result = make_result("kivi2", kl)
    del result["results"]["arc_easy"], result["results"]["needle"]
    verdict = verdict_of(result)
    assert verdict.grade == grade
    assert says in verdict.headline
    assert "3.30 bits a number at 131,072 tokens" in verdict.headline


def test_a_task_that_is_worse_takes_the_good_grade(make_result):
    verdict = verdict_of(make_result("kivi4", 0.001))
    assert verdict.grade == "fair"
    assert "shown to be worse on arc_easy" in verdict.headline


def test_drift_is_told_and_not_held_against_it(make_result):
    result = make_result("kivi4", 0.001)
    worse = {**result["results"]["arc_easy"], "acc": {**result["results"]["arc_easy"]["acc"], "value": 16.0}}
    result["results"] = {"divergence": result["results"]["divergence"], "drift": worse}
    verdict = verdict_of(result)
    assert verdict.grade == "good"
    assert any("leaves the baseline's after 16 of" in point for point in verdict.points)


def test_too_few_samples_are_said_to_be_too_few(make_result):
    points = verdict_of(make_result("kivi2", 0.02)).points
    assert any(point.startswith("Too few samples to tell: needle") for point in points)
    assert any(point.startswith("Every answer the same: piqa (+0.0 [−3.2, 3.2]") for point in points)


def test_without_divergence_the_tasks_speak(make_result):
    result = make_result("kivi2", 0.06)
    tasks = result["results"]
    result["results"] = {"arc_easy": tasks["arc_easy"]}
    assert verdict_of(result).headline.startswith("kivi2 is shown to be worse on arc_easy")
    result["results"] = {"piqa": tasks["piqa"]}
    assert "answers as the baseline does on piqa" in verdict_of(result).headline
    result["results"] = {"speed": tasks["speed"]}
    assert "nothing here measures its quality" in verdict_of(result).headline


def test_what_was_not_measured_is_said(make_result):
    result = make_result("kivi2")
    result["results"]["piqa"] = {**result["results"]["piqa"], "refused": "no token reads anything quantized"}
    result["results"]["arc_easy"]["weak"] = True
    result |= {"partial": True, "unfinished": ["boolq"], "mode": "simulate"}
    result["results"]["divergence"]["windows"] = 2
    text = " ".join(verdict_of(result).points)
    for words in (
        "Not measured: piqa, because no token reads",
        "baseline itself cannot do arc_easy",
        "Missing: boolq",
        "Mode simulate quantizes every number",
        "2 windows: errors are rough",
    ):
        assert words in text


def test_the_control_is_called_one(make_result):
    assert verdict_of(make_result("fp16", 0.0)).grade == "exact"


def test_the_question_that_a_mode_answers(make_result):
    asked = {mode: question(make_result(mode=mode)) for mode in ("stream", "prefill", "chunked", "simulate")}
    assert len(set(asked.values())) == 4
    assert "token-by-token" in asked["stream"]
    assert "gsm8k: written through the packed cache after an exact prompt" in asked["stream"]
    assert "what a user sees after a prompt" in asked["prefill"]


def test_the_front_holds_what_nothing_beats_in_both(make_result):
    runs = {"fp16": 0.0, "int8": 0.0003, "kivi4": 0.004, "int4": 0.002, "kivi2": 0.06}
    results = [make_result(name, kl) for name, kl in runs.items()]
    text = overall(list(runs), results)
    assert text.startswith("Nothing here is both smaller and closer")
    assert [name for name in runs if f"{name} (" in text] == ["int8", "int4", "kivi2"]
    assert overall(["kivi2"], results[-1:]) == ""
    assert overall(["fp16", "kivi2"], [results[0], results[-1]]) == ""
    assert overall(["int8", "kivi2"], [results[1], results[-1]]).startswith("Each of these")


def test_sizes_are_compared_at_one_length(make_result):
    """At 256 tokens an exact window hides what kivi2 saves: the bits there say int4, those at the context kivi2.
    Control: results without such rows are compared as measured."""

    def measured(name, bits, later, kl):
        memory = [{"tokens": n, "plain_bytes": 16 * n, "recipe_bytes": round(later * n)} for n in (4096, 8192)]
        return make_result(name, kl=kl, bits_per_element=bits, memory=memory)

    results = [measured("kivi2", 9.1, 2.6, 0.08), measured("int4", 4.5, 4.5, 0.07)]
    said = overall(["kivi2", "int4"], results)
    assert said == "Each of these trades size for error: kivi2 (2.60 bits, KL 0.0800); int4 (4.50 bits, KL 0.0700)."
    assert "2.60 bits a number at 8,192 tokens" in verdict_of(results[0]).headline
    page = html_report(results)
    assert "bits per element at 8,192 tokens" in page
    assert "bits per element at 256 tokens" not in page
    assert "32,768" not in page
    bare = [result | {"memory": []} for result in results]
    assert overall(["kivi2", "int4"], bare).endswith("int4 (4.50 bits, KL 0.0700).")


@pytest.mark.parametrize(
    ("kl", "top1", "words"),
    [(0.004, 0.86, "changes the model noticeably"), (0.004, 0.99, "is close to lossless"), (0.004, 0.5, "strongly")],
)
def test_a_small_kl_of_a_flat_model_is_not_lossless(make_result, kl, top1, words):
    result = make_result("kivi4", kl=kl)
    result["results"]["divergence"]["top1"] = top1
    assert words in verdict_of(result).headline
