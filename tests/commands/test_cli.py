"""The group itself: help, mistyped input, exit codes, and JSON that stays alone on stdout."""

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from kvq.cli import COMMANDS
from kvq.commands.common import Output, progress_bar
from kvq.progress import is_heard, tell


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_with_examples(run, name):
    result = run(name, "--help")
    assert result.exit_code == 0
    assert "Examples:" in result.stdout
    assert f"kvq {name} " in result.stdout


def test_the_group_lists_every_command(run):
    result = run("--help")
    assert result.exit_code == 0
    assert all(f"\n  {name} " in result.stdout for name in COMMANDS)
    assert run("--version").stdout.startswith("kvq ")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["exprot"], ["'exprot'", "Did you mean 'export'?"]),
        (["calibrate"], ["MODEL", "kvq calibrate --help"]),
        (["calibrate", "builtin"], ["--output", "kvq calibrate --help"]),
        (["eval", "x", "--mode", "steam"], ["'steam'", "stream"]),
        (["eval", "x", "--limit", "0"], ["--limit", "0"]),
        (["eval", "x", "--tasks", " , "], ["--tasks"]),
        (["export", "x", "--recipe", "kivi2"], ["-o DIR", "--dry-run"]),
        (["export", "x", "--recipe", "kivi2", "--sett", "a=1"], ["--sett", "--set"]),
        (["recipes", "shwo"], ["shwo"]),
        (["generate", "x", "--prompt", "  "], ["prompt is empty"]),
    ],
)
def test_mistyped_input_is_one_sentence(refuse, args, says):
    refuse(*args, says=tuple(says))


@pytest.mark.parametrize("target", ["missing/out.json", "."])
def test_a_json_target_that_cannot_be_written_is_refused_before_the_work(refuse, target, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refuse("recipes", "list", "--json", target, says=(repr("missing" if "/" in target else "."),))


def test_json_to_stdout_is_the_only_thing_there(run):
    result = run("doctor", "--json", "-")
    assert set(json.loads(result.stdout)) >= {"versions", "gpu", "attention"}
    assert "torch" in result.stderr


def test_json_to_a_file_leaves_the_tables_on_stdout(run, tmp_path):
    file = tmp_path / "out.json"
    result = run("recipes", "list", "--json", file)
    assert "kivi2" in result.stdout
    assert "kivi2" in {row["name"] for row in json.loads(file.read_text())["recipes"]}
    assert os.listdir(tmp_path) == ["out.json"]


def test_json_has_null_for_numbers_that_it_cannot_hold(tmp_path):
    file = tmp_path / "out.json"
    Output(str(file)).write({"a": float("nan"), "b": [float("inf"), 1.5]})
    assert json.loads(file.read_text()) == {"a": None, "b": [None, 1.5]}


@pytest.mark.parametrize(
    ("error", "says", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "out"), "no space is left on the disk at 'out'", 2),
        (PermissionError(errno.EACCES, "Permission denied", "out"), "permission denied at 'out'", 2),
        (MemoryError(), "memory is full", 2),
        (torch.OutOfMemoryError("CUDA"), "GPU is out of memory", 2),
        (KeyboardInterrupt(), "Interrupted.", 130),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "", 1),
    ],
)
def test_errors_of_the_machine_are_one_sentence(run, monkeypatch, error, says, code):
    def fail():
        raise error

    monkeypatch.setattr("kvq.recipes.list_recipes", fail)
    result = run("recipes", "list")
    assert (result.exit_code, result.stdout.strip()) == (code, "")
    assert says in result.stderr
    assert len(result.stderr.strip().splitlines()) <= 1


def test_a_fault_of_kvq_itself_keeps_its_traceback(run, monkeypatch):
    monkeypatch.setattr("kvq.recipes.list_recipes", lambda: 1 / 0)
    assert isinstance(run("recipes", "list").exception, ZeroDivisionError)


def test_the_progress_bar_is_silent_without_a_terminal(capsys):
    with progress_bar("Working", tokens={"": 24}) as step:
        for done in range(4):
            step(done, 3)
    assert capsys.readouterr() == ("", "")


def test_the_progress_bar_moves_inside_a_step(monkeypatch):
    """Time left and tokens/s are there before the first step is done, and it never goes back."""
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with progress_bar("Working", tokens={"": 4000}) as step:
        step(0, 4)
        time.sleep(0.1)
        tell(0.25)
        tell(0.1)
    # A quarter of a step of 1,000 tokens in at least 0.1 s.
    speeds = [int(found.replace(",", "")) for found in re.findall(r"([0-9,]+) tokens/s", terminal.getvalue())]
    assert speeds
    assert 0 < min(speeds) <= max(speeds) <= 2500
    assert re.search(r"[0-9]+:[0-9]{2}:[0-9]{2}", terminal.getvalue())
    assert not is_heard()


def test_an_interrupt_is_one_line_and_130():
    script = """
import time, kvq.cli, kvq.recipe
kvq.recipes.list_recipes = lambda: print("ready", flush=True) or time.sleep(30)
kvq.cli.main(["recipes", "list"])
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert stderr.strip() == "Interrupted."


def test_help_imports_neither_torch_nor_transformers():
    script = """
import sys
from click.testing import CliRunner
from kvq.cli import main
for args in (["--help"], ["eval", "--help"], ["recipes", "list"]):
    assert CliRunner().invoke(main, args).exit_code == 0
print({"torch", "transformers"} & set(sys.modules))
"""
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "set()"
