"""Kept answers: by key, whole after a kill, to the bit."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from kvq.errors import CheckpointError
from kvq.eval.results_cache import Answers, item_name, packed_tensor, unpacked_tensor

KEY = {"recipe": "a", "mode": "stream"}


def test_answers_come_back_in_order_or_not_at_all(tmp_path):
    answers = Answers(tmp_path, KEY)
    answers.put([("one", [1, None]), ("two", {"x": 0.1})])
    again = Answers(tmp_path, dict(reversed(KEY.items())))
    assert again.get(["two", "one"]) == [{"x": 0.1}, [1, None]]
    assert again.get(["one", "three"]) is None
    assert len(again) == 2
    again.put([("one", 5)])
    assert answers.get(["one"]) == [5]


@pytest.mark.parametrize("other", [{"recipe": "b"}, {"mode": "prefill"}, {"task": "x"}])
def test_another_key_reads_nothing(tmp_path, other):
    Answers(tmp_path, KEY).put([("one", 1)])
    assert Answers(tmp_path, KEY | other).get(["one"]) is None


def test_a_file_under_a_wrong_name_is_not_believed(tmp_path):
    first, second = Answers(tmp_path, KEY), Answers(tmp_path, {"recipe": "b"})
    first.put([("one", 1)])
    first.close()
    second.close()
    os.replace(first.path, second.path)
    with pytest.raises(CheckpointError, match="another evaluation"):
        Answers(tmp_path, {"recipe": "b"})


def test_a_broken_file_is_named(tmp_path):
    answers = Answers(tmp_path, KEY)
    answers.close()
    answers.path.write_bytes(b"not a data base, not at all " * 200)
    with pytest.raises(CheckpointError, match="--no-cache"):
        Answers(tmp_path, KEY)


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answers = Answers(None, KEY)
    answers.put([("one", 1)])
    assert answers.get(["one"]) == [1]
    assert list(tmp_path.iterdir()) == []


def test_after_a_kill_every_transaction_is_whole(tmp_path):
    code = (
        "import sys, itertools\nfrom kvq.eval.results_cache import Answers\n"
        f"answers = Answers({str(tmp_path)!r}, {KEY!r})\n"
        "for i in itertools.count():\n"
        "    answers.put([(f'{i}.{part}', 'x' * 2000) for part in range(20)])\n"
        "    print(i, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "0"
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    answers = Answers(tmp_path, KEY)
    assert len(answers) % 20 == 0
    assert answers.get([f"0.{part}" for part in range(20)]) == ["x" * 2000] * 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bool, torch.int64])
def test_tensors_come_back_to_the_bit(dtype):
    values = (torch.randn(37, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    found = unpacked_tensor(packed_tensor(values))
    assert found.dtype == dtype
    assert torch.equal(found, values)
    assert unpacked_tensor(packed_tensor(values[:0])).shape == (0,)


def test_names_depend_on_every_part():
    names = {item_name("a", [1, 2]), item_name("a", [1, 3]), item_name("b", [1, 2]), item_name("a", [1], [2])}
    assert len(names) == 4
    assert item_name("a", {"x": 1, "y": 2}) == item_name("a", {"y": 2, "x": 1})
