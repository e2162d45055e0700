"""What killed processes leave is cleared; what a living process, or one of another host, writes to is left alone."""

import os
import subprocess

import pytest

from kvq import atomic
from kvq.exporting.atomic_folder import recover


@pytest.fixture(scope="module")
def ended() -> int:
    """Number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.fixture
def named(ended):
    """``named(form)``: names by whose they are, of the form with the owner in it."""
    host = atomic.owner().rpartition("-")[0]
    owners = {
        "ended": f"{host}-{ended}",
        "reused": f"{host}-{os.getpid()}",
        "living": f"{host}-{os.getppid()}",
        "elsewhere": f"another-host-{ended}",
        "unknown": "mine",
    }
    return lambda form: {whose: form.format(owner) for whose, owner in owners.items()}


def test_only_ended_processes_of_this_host_are_known_to_have_ended(named):
    found = {whose: atomic.has_ended(name) for whose, name in named("{}").items()}
    assert found == {"ended": True, "reused": True, "living": False, "elsewhere": False, "unknown": False}
    assert not atomic.has_ended("")


@pytest.mark.parametrize("kind", ["tmp", "scratch"])
def test_recovering_a_folder_spares_an_export_that_another_host_is_writing(tmp_path, named, kind):
    names = named(f".export.kvq-{kind}-{{}}")
    for name in names.values():
        (tmp_path / name).mkdir()
    recover(tmp_path / "export")
    kept = {names[whose] for whose in ("living", "elsewhere", "unknown")}
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_a_folder_that_another_host_has_moved_aside_is_not_put_back(tmp_path, named):
    names = named(".export.kvq-old-{}")
    (tmp_path / names["elsewhere"]).mkdir()
    recover(tmp_path / "export")
    assert not (tmp_path / "export").exists()
    (tmp_path / names["ended"]).mkdir()
    recover(tmp_path / "export")
    assert {path.name for path in tmp_path.iterdir()} == {"export", names["elsewhere"]}


def test_writing_a_file_removes_what_killed_writers_of_it_left(tmp_path, named):
    names, other = named(".a.st.{}.tmp"), named(".b.st.{}.tmp")["ended"]
    for name in (*names.values(), other):
        (tmp_path / name).touch()
    atomic.write_whole(tmp_path / "a.st", [b"one", b" two"])
    assert (tmp_path / "a.st").read_bytes() == b"one two"
    kept = {names[whose] for whose in ("living", "elsewhere", "unknown")}
    assert {path.name for path in tmp_path.iterdir()} == {"a.st", other} | kept


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    def pieces():
        yield b"new"
        raise KeyboardInterrupt

    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        atomic.write_whole(tmp_path / "a", pieces())
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"old")]
