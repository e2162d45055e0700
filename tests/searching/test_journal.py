"""Finished jobs survive a kill at any byte; another search's journal is not taken."""

import logging

from kvq.searching.journal import Journal, identity_hash


def test_jobs_are_done_once(tmp_path):
    path, calls = tmp_path / "j.jsonl", []
    first = Journal(path, "me")
    assert first.do("a", lambda: calls.append(1) or {"kl": 1 / 3}) == {"kl": 1 / 3}
    assert first.do("a", lambda: calls.append(1)) == {"kl": 1 / 3}
    first.close()
    again = Journal(path, "me")
    assert again.resumed == 1
    assert again.do("a", lambda: calls.append(1)) == {"kl": 1 / 3}
    assert calls == [1]
    assert again.seconds > 0


def test_a_line_that_was_cut_short_at_any_byte_is_dropped(tmp_path):
    path = tmp_path / "j.jsonl"
    journal = Journal(path, "me")
    for name in "ab":
        journal.do(name, lambda name=name: {"x": name})
    journal.close()
    whole = path.read_bytes()
    second = whole.rindex(b'{"job"')
    for end in range(second + 1, len(whole) - 1):
        path.write_bytes(whole[:end])
        again = Journal(path, "me")
        assert list(again.found) == ["a"]
        again.do("b", lambda: {"x": "b"})
        again.close()
        assert list(Journal(path, "me").found) == ["a", "b"]


def test_another_search_starts_over_and_says_so(tmp_path, caplog):
    path = tmp_path / "j.jsonl"
    journal = Journal(path, identity_hash({"seed": 0}))
    journal.do("a", lambda: 1)
    journal.close()
    with caplog.at_level(logging.WARNING, logger="kvq"):
        other = Journal(path, identity_hash({"seed": 1}))
    assert other.found == {}
    assert "Starting over" in caplog.text
