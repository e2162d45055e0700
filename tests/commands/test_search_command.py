"""``kvq search``."""

import contextlib
import itertools
import json
import signal
import sqlite3
import subprocess
import sys
import time

import pytest
import yaml

from kvq.recipe import load_recipe

SPACE = {
    "key": [
        {"name": "plain", "codec": {"codec": "affine", "axis": "channel", "group": 32}, "vary": {"bits": [2, 4, 8]}}
    ],
    "value": [
        {"name": "rotated", "codec": {"codec": "affine", "axis": "token", "group": "head"}, "vary": {"bits": [2, 4]}}
    ],
    "tokens": [{"sinks": 4, "window": 32}],
}
SMALL = ("--seq-len", 96, "--windows", 1, "--verify-windows", 2)


@pytest.fixture
def space(tmp_path):
    file = tmp_path / "space.yaml"
    file.write_text(yaml.safe_dump(SPACE))
    return file


@pytest.fixture
def model(tiny_checkpoint):
    return tiny_checkpoint(layers=2, head_dim=32)


def test_recipe_evidence_and_pictures_are_written(run, model, text, space, tmp_path):
    out = tmp_path / "mine.yaml"
    result = run("search", model, "--budget", 4.5, "-o", out, "--data", text, "--space", space, *SMALL, "--json", "-")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    proof = json.loads((tmp_path / "mine.evidence.json").read_text())
    assert load_recipe(out).hash == proof["recipe_hash"] == data["points"][0]["recipe_hash"]
    assert load_recipe(out).name == "mine"
    assert proof["bits"] <= 4.5
    assert str(tmp_path) not in json.dumps(proof)
    assert proof["command"].startswith("kvq")
    assert (tmp_path / "mine.front.png").read_bytes().startswith(b"\x89PNG")
    assert "<html" in (tmp_path / "mine.front.html").read_text()
    assert not (tmp_path / "mine.journal.sqlite").exists()
    assert "is valid" in run("recipes", "check", out, "--model", model).stdout


def test_several_budgets_from_one_table(run, model, text, space, tmp_path):
    out = tmp_path / "mine-{budget}.yaml"
    budgets = ("--budget", 4.5, "--budget", 6)
    result = run("search", model, *budgets, "-o", out, "--data", text, "--space", space, *SMALL)
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.glob("mine-*.yaml")} == {"mine-4.5.yaml", "mine-6.yaml"}
    assert "Left out" not in result.output


def test_bad_calls_are_refused_in_one_sentence(refuse, model, text, space, tmp_path):
    out, data = tmp_path / "mine.yaml", ("--data", text, "--space", space, *SMALL)
    refuse("search", model, "--budget", 4, "--budget", 5, "-o", out, says=("a name each",))
    refuse("search", model, "--budget", 4, "-o", tmp_path / "mine.txt", says=("end it in .yaml",))
    refuse("search", model, "--budget", 4, "-o", tmp_path / "no" / "mine.yaml", says=("does not exist",))
    refuse("search", model, "--budget", 4, "-o", out, "--floor", "top=1", *data, says=("'top=1'", "top1"))
    refuse("search", model, "--budget", 4, "-o", out, "--floor", "top1=x", *data, says=("no number",))
    refuse("search", model, "--budget", 1, "-o", out, *data, says=("budget=1", "raise it"))
    refuse("search", model, "--budget", 4.5, "-o", out, "--floor", "top1=1", *data, says=("top1=1", "unseen text"))
    refuse(
        "search",
        model,
        "--budget",
        4,
        "-o",
        out,
        "--data",
        text,
        "--space",
        tmp_path / "none",
        says=("cannot be read",),
    )
    refuse("search", model, "--budget", 4, "-o", out, "--data", text, says=("windows of 2048 tokens",))
    assert not list(tmp_path.glob("mine.*yaml"))


def test_an_interrupted_search_goes_on(run, model, text, space, tmp_path, monkeypatch):
    out = tmp_path / "mine.yaml"
    arguments = ("search", model, "--budget", 4.5, "-o", out, "--data", text, "--space", space, *SMALL)
    monkeypatch.setattr(
        "kvq.searching.verify.Verifier.measure", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    assert run(*arguments).exit_code == 130
    journal = tmp_path / "mine.journal.sqlite"
    assert journal.exists()
    monkeypatch.undo()
    monkeypatch.setattr("kvq.searching.sensitivity.Sensitivity._scan", None)
    assert run(*arguments).exit_code == 0
    assert out.exists()
    assert not journal.exists()


def test_a_search_that_its_time_limit_cuts_writes_its_files_and_goes_on(run, model, text, space, tmp_path, monkeypatch):
    out = tmp_path / "mine.yaml"
    arguments = ("search", model, "--budget", 4.5, "-o", out, "--data", text, "--space", space, *SMALL)
    with monkeypatch.context() as patch:
        # Seconds that pass with every look at the clock.
        patch.setattr("kvq.searching.deadline.monotonic", map(float, itertools.count()).__next__)
        cut = run(*arguments, "--time-limit", 10 / 60)
    assert cut.exit_code == 0, cut.output
    assert "call it again to go on where it was" in cut.stdout
    proof = json.loads((tmp_path / "mine.evidence.json").read_text())
    assert not proof["complete"]
    assert proof["left_out"]
    assert load_recipe(out).hash == proof["recipe_hash"]
    assert jobs_in(tmp_path / "mine.journal.sqlite") >= 3
    assert run(*arguments).exit_code == 0
    assert json.loads((tmp_path / "mine.evidence.json").read_text())["complete"]
    assert not (tmp_path / "mine.journal.sqlite").exists()


def jobs_in(journal):
    """Finished jobs, beside the item that says which search it is."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{journal}?mode=ro", uri=True)) as base:
            return base.execute("SELECT COUNT(*) FROM answers").fetchone()[0] - 1
    except sqlite3.DatabaseError:
        # It is being made.
        return 0


@pytest.mark.long
def test_killed_without_warning_it_gives_the_same_files(run, model, text, space, tmp_path):
    """SIGKILL while the journal grows; the second call goes on and writes what an undisturbed search writes."""
    arguments = ["search", model, "--budget", "4.5", "--data", text, "--space", space, *SMALL, "-o"]
    killed, whole = tmp_path / "killed.yaml", tmp_path / "whole.yaml"
    journal = tmp_path / "killed.journal.sqlite"
    process = subprocess.Popen(
        [sys.executable, "-m", "kvq.cli", *map(str, [*arguments, killed])],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and jobs_in(journal) < 3:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not killed.exists()
    assert jobs_in(journal) >= 3
    for out in (killed, whole):
        assert run(*arguments, out).exit_code == 0
    first, second = (json.loads(out.with_suffix(".evidence.json").read_text()) for out in (killed, whole))
    for name in ("recipe_hash", "confirmed", "chosen_from", "table", "solver"):
        assert first[name] == second[name]
    assert load_recipe(killed).layers == load_recipe(whole).layers


def test_statistics_of_the_confirming_text_are_noticed(run, model, text, space, tmp_path):
    stats = tmp_path / "s.safetensors"
    assert run("calibrate", model, "-o", stats, "--data", text, "--samples", 4, "--seq-len", 64).exit_code == 0
    arguments = ("search", model, "--stats", stats, "--budget", 4.5, "--data", text, "--space", space, *SMALL)
    assert "use --verify-data" in run(*arguments, "-o", tmp_path / "mine.yaml").stderr
    assert json.loads((tmp_path / "mine.evidence.json").read_text())["statistics_saw_the_text"]
