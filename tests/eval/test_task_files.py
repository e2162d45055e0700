"""Task files given by path go by the name that they state; what is no task file is refused."""

import pytest

from kvq.errors import DataError
from kvq.eval.settings import Settings
from kvq.eval.task_files import is_group, task_names


@pytest.fixture
def write(tmp_path):
    def one(name, text):
        file = tmp_path / name
        file.write_text(text)
        return str(file)

    return one


def test_files_become_names_in_the_given_order(write):
    single = write("a.yaml", "task: own\ndoc_to_text: !function code.py:text\n")
    group = write("b.yaml", "group: several\ntask: [x, y]\n")
    names = task_names(["perplexity", group, single])
    assert list(names) == ["perplexity", "several", "own"]
    assert names["perplexity"] is None
    assert str(names["own"]) == single
    assert is_group(names["several"])
    assert not is_group(names["own"])
    settings = Settings(tasks=("divergence", single))
    assert settings.tasks == ("divergence", "own")
    assert settings.foreign == ("own",)
    assert {name: str(file) for name, file in settings.task_files.items()} == {"own": single}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("task: [x, y]\n", "names no task"),
        ("- task: x\n", "names no task"),
        ("output_type: multiple_choice\n", "names no task"),
        ("task: {\n", "cannot be read as YAML"),
        ("task: needle\n", "kvq's own task 'needle'"),
    ],
)
def test_files_that_are_no_tasks_are_refused(write, text, says):
    with pytest.raises(DataError, match=says):
        Settings(tasks=(write("a.yaml", text),))


def test_missing_files_and_equal_names_are_refused(write, tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        task_names([str(tmp_path / "absent.yaml")])
    one, other = write("a.yaml", "task: own\n"), write("b.yaml", "task: own\n")
    assert list(task_names([one, one])) == ["own"]
    with pytest.raises(DataError, match="two of the tasks are called 'own'"):
        task_names([one, other])
    with pytest.raises(DataError, match="two of the tasks are called 'own'"):
        task_names(["own", other])
