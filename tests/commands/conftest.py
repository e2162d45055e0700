"""Run commands in this process, and the one way in which they may refuse."""

import logging
import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from transformers.utils import logging as transformers_logging

from kvq.cli import main
from kvq.commands.common import NOISY_LOGGERS


@pytest.fixture(autouse=True)
def _undo_silence(monkeypatch):
    """The commands silence the libraries for the life of their process, which here is the test run's."""
    own = logging.getLogger("kvq")
    levels = {name: logging.getLogger(name).level for name in NOISY_LOGGERS}
    handlers, environment = list(own.handlers), dict(os.environ)
    yield
    own.handlers[:], own.propagate = handlers, True
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    transformers_logging.enable_progress_bar()
    for name in set(os.environ) - set(environment):
        del os.environ[name]


@pytest.fixture
def run():
    """``run(*args, input=None) -> Result`` of ``kvq ARGS``."""

    def invoke(*args, input: str | None = None) -> Result:
        return CliRunner().invoke(main, [str(arg) for arg in args], input=input)

    return invoke


@pytest.fixture
def refuse(run):
    """``refuse(*args, says=(...))``: the command must end with code 2 and one line on stderr that holds every word."""

    def invoke(*args, says: tuple[str, ...], input: str | None = None) -> str:
        result = run(*args, input=input)
        assert result.exit_code == 2, result.output
        lines = result.stderr.strip().splitlines()
        assert len(lines) == 1, result.stderr
        assert lines[0].startswith("Error: ")
        assert "Traceback" not in result.output
        for word in says:
            assert word in lines[0]
        return lines[0]

    return invoke


@pytest.fixture
def text(tmp_path) -> Path:
    """A text file of 8,000 characters, which the tiny tokenizer makes 8,000 tokens."""
    file = tmp_path / "text.txt"
    file.write_text("The quick brown fox jumps over the lazy dog; 0123456789. " * 141)
    return file


@pytest.fixture
def stats(run, text, tmp_path):
    """``stats(model) -> Path``: statistics of a checkpoint folder, by the command itself."""

    def calibrate(model: Path, name: str = "stats.safetensors") -> Path:
        file = tmp_path / name
        result = run("calibrate", model, "-o", file, "--data", text, "--samples", 4, "--seq-len", 64)
        assert result.exit_code == 0, result.output
        return file

    return calibrate


@pytest.fixture
def exported(run, tiny_checkpoint, tmp_path):
    """``exported(recipe="kivi2", *args) -> Path``: an export of a tiny model, by the command itself."""

    def export(recipe: str = "kivi2", *args) -> Path:
        folder = tmp_path / f"export-{recipe}"
        result = run("export", tiny_checkpoint(head_dim=32), "--recipe", recipe, "-o", folder, *args)
        assert result.exit_code == 0, result.output
        return folder

    return export
