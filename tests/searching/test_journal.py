"""Finished jobs survive a kill at any time; another search's journal is not taken."""

import logging
import signal
import subprocess
import sys
import time

import pytest

from kvq.errors import CheckpointError
from kvq.searching.journal import Journal, identity_hash


def test_jobs_are_done_once(tmp_path):
    path, calls = tmp_path / "j.sqlite", []
    first = Journal(path, "me")
    assert first.do("a", lambda: calls.append(1) or {"kl": 1 / 3}) == {"kl": 1 / 3}
    assert first.do("a", lambda: calls.append(1)) == {"kl": 1 / 3}
    first.close()
    again = Journal(path, "me")
    assert list(again.found) == ["a"]
    assert again.do("a", lambda: calls.append(1)) == {"kl": 1 / 3}
    assert calls == [1]
    assert again.seconds > 0


def test_a_kill_at_any_time_leaves_whole_jobs(tmp_path):
    """Jobs are noted until SIGKILL; what is left are the first of them, each as it was noted."""
    path = tmp_path / "j.sqlite"
    code = (
        "import itertools, pathlib\nfrom kvq.searching.journal import Journal\n"
        f"journal = Journal(pathlib.Path({str(path)!r}), 'me')\n"
        "for i in itertools.count():\n"
        "    journal.do(str(i), lambda: {'x': [i / 3] * 500})\n"
        "    print(i, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "0"
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    written = [0, *map(int, process.communicate()[0].split())]
    again = Journal(path, "me")
    assert list(again.found) == [str(i) for i in range(len(again.found))]
    assert len(written) <= len(again.found) <= len(written) + 1
    assert all(again.found[str(i)] == {"x": [i / 3] * 500} for i in written)
    again.do("last", lambda: 1)
    again.close()
    assert list(Journal(path, "me").found)[-1] == "last"


def test_a_broken_journal_is_named(tmp_path):
    path = tmp_path / "j.sqlite"
    path.write_bytes(b"not a data base, not at all " * 200)
    with pytest.raises(CheckpointError, match=r"j\.sqlite.*remove that file\.$"):
        Journal(path, "me")


def test_another_search_starts_over_and_says_so(tmp_path, caplog):
    path = tmp_path / "j.sqlite"
    journal = Journal(path, identity_hash({"seed": 0}))
    journal.do("a", lambda: 1)
    journal.close()
    with caplog.at_level(logging.WARNING, logger="kvq"):
        other = Journal(path, identity_hash({"seed": 1}))
    assert other.found == {}
    assert "Starting over" in caplog.text
