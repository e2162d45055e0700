"""lm-eval's tasks on local rows: which file is read, what a row must have, and that prompts are lm-eval's own."""

import json

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'kvq-toolkit[eval]'")

from lm_eval.tasks import TaskManager

from kvq.errors import DataError
from kvq.eval.local import local_names, local_task, wikitext_pages

ROWS = {
    "arc_easy": {
        "question": "Which is hot?",
        "choices": {"text": ["ice", "fire"], "label": ["A", "B"]},
        "answerKey": "B",
    },
    "arc_challenge": {
        "question": "Which is cold?",
        "choices": {"text": ["ice", "fire"], "label": ["1", "2"]},
        "answerKey": "1",
    },
    "hellaswag": {
        "ctx_a": "A man runs.",
        "ctx_b": "he",
        "activity_label": "Running",
        "endings": ["stops [title] now", "flies", "sings", "eats"],
        "label": "0",
    },
    "piqa": {"goal": "Open a door", "sol1": "push it", "sol2": "eat it", "label": 0},
    "boolq": {"passage": "Water is wet.", "question": "is water wet", "label": 1},
    "gsm8k": {"question": "What is 1 + 1?", "answer": "1 + 1 = 2\n#### 2"},
    "lambada_openai": {"text": "The cat sat on the mat"},
    "wikitext": {"page": " = Cats = \n\n Cats are animals . \n"},
}
FIRST = {
    "arc_easy": ("Question: Which is hot?\nAnswer:", " ice"),
    "arc_challenge": ("Question: Which is cold?\nAnswer:", " ice"),
    "hellaswag": ("Running: A man runs. He", " stops. now"),
    "piqa": ("Question: Open a door\nAnswer:", " push it"),
    "boolq": ("Water is wet.\nQuestion: is water wet?\nAnswer:", " no"),
    "lambada_openai": ("The cat sat on the", " mat"),
    "wikitext": (" = Cats =\n\nCats are animals.\n",),
}


@pytest.fixture
def folder(tmp_path):
    """A folder with 8 rows of every task."""
    where = tmp_path / "rows"
    where.mkdir()
    for name, row in ROWS.items():
        (where / f"{name}_test.jsonl").write_text((json.dumps(row) + "\n") * 8)
    return where


@pytest.fixture(autouse=True)
def _quiet():
    import datasets

    datasets.disable_progress_bars()


def built(name, folder, tmp_path):
    target = tmp_path / "tasks"
    target.mkdir(exist_ok=True)
    local_task(name, folder).write(target)
    return TaskManager(include_path=str(target), include_defaults=False).load([name])["tasks"][name]


def test_every_task_file_has_its_rows_here():
    assert local_names() == sorted(ROWS)


@pytest.mark.parametrize("name", sorted(ROWS))
def test_prompts_are_lm_evals_own(name, folder, tmp_path):
    task = built(name, folder, tmp_path)
    task.set_config("num_fewshot", 0)
    task.build_all_requests(limit=1)
    arguments = task.instances[0].args
    if name == "gsm8k":
        assert arguments[0] == "Question: What is 1 + 1?\nAnswer:"
        assert "Question:" in arguments[1]["until"]
    else:
        assert tuple(arguments) == FIRST[name]
    # A quarter of so few rows is kept for examples, where a task can use some.
    assert len(task.test_docs()) == (8 if name == "wikitext" else 6)


def test_examples_never_come_from_the_rows_that_are_asked(tmp_path):
    where = tmp_path / "rows"
    where.mkdir()
    rows = [{"text": f"This is row number {i} of many"} for i in range(200)]
    (where / "lambada_openai.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = local_task("lambada_openai", where)
    assert [row["text"] for row in found.rows] == [row["text"] for row in rows[:168]]
    assert [row["text"] for row in found.examples] == [row["text"] for row in rows[168:]]
    task = built("lambada_openai", where, tmp_path)
    task.set_config("num_fewshot", 5)
    task.set_fewshot_seed(3)
    task.build_all_requests(limit=4)
    for instance in task.instances:
        numbers = [int(word) for word in instance.args[0].split() if word.isdigit()]
        assert len(numbers) == 6
        assert all(number >= 168 for number in numbers[:-1])
        assert numbers[-1] < 168


def test_a_training_file_holds_the_examples(folder):
    (folder / "gsm8k_train_200.jsonl").write_text(json.dumps({"question": "q", "answer": "a"}) + "\n")
    found = local_task("gsm8k", folder)
    assert len(found.rows) == 8
    assert list(found.examples) == [{"question": "q", "answer": "a"}]
    assert found.identity["examples_file"] == "gsm8k_train_200.jsonl"
    assert len(found.identity["sha256"]) == 64


def test_an_exact_name_wins_and_two_others_are_ambiguous(folder):
    (folder / "piqa_other.jsonl").write_text(json.dumps(ROWS["piqa"]) + "\n")
    with pytest.raises(DataError, match=r"several files could hold the rows of 'piqa' \(piqa_other.jsonl, piqa_test"):
        local_task("piqa", folder)
    (folder / "piqa.jsonl").write_text((json.dumps(ROWS["piqa"]) + "\n") * 3)
    assert local_task("piqa", folder).identity["file"] == "piqa.jsonl"
    # arc_easy does not take arc_easy2's rows.
    (folder / "arc_easy2.jsonl").write_text("{}\n")
    assert local_task("arc_easy", folder).identity["file"] == "arc_easy_test.jsonl"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("{not json\n", "line 1 of 'piqa_test.jsonl' is not JSON"),
        (
            '{"goal": "x", "sol1": "y", "sol2": "z", "label": 0}\n[1]\n',
            "line 2 of 'piqa_test.jsonl' has no field 'goal'",
        ),
        ('{"goal": "x", "sol1": "y", "label": 0}\n', "no field 'sol2'"),
    ],
)
def test_bad_rows_are_named(folder, content, message):
    (folder / "piqa_test.jsonl").write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        local_task("piqa", folder)
    assert "\n" not in str(caught.value)


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        local_task("piqa", tmp_path / "none")
    with pytest.raises(DataError, match=r"piqa.jsonl or piqa_\*.jsonl"):
        local_task("piqa", tmp_path)


def test_wikitext_lines_become_articles():
    text = " \n = One = \n \n Text of = one = here . \n = = Part = = \n More . \n \n = Two words = \n \n Text . \n"
    pages = wikitext_pages(text)
    assert len(pages) == 3 - 1
    assert pages[0].startswith(" = One = ")
    assert " = = Part = = " in pages[0]
    assert pages[1].startswith(" = Two words = ")
    assert "\n\n" in pages[0]
