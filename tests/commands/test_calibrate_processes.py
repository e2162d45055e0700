"""``kvq calibrate`` as processes: killed at random moments, interrupted, and shared by torchrun.

Processes are forked from a server that has imported everything, so that a start takes no seconds.
"""

import contextlib
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvq.calib.stats import Stats

ROOT = Path(__file__).parents[2]
ARGUMENTS = ("--samples", "24", "--seq-len", "48", "--batch-size", "1", "--full")


def calibrate(*arguments: str) -> None:
    """Run the command; in a process of its own."""
    import torch

    from kvq.cli import main

    torch.set_num_threads(1)
    main(["calibrate", *arguments])


def calibrate_as(rank: int, port: int, folder: str, *arguments: str) -> None:
    """Run the command as one of two processes, with the environment that torchrun gives and output into files."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in own.items()}
    sys.stdout = open(Path(folder) / f"out-{rank}", "w", buffering=1)  # noqa: SIM115
    sys.stderr = open(Path(folder) / f"err-{rank}", "w", buffering=1)  # noqa: SIM115
    calibrate(*arguments)


def kill_at_step(step: int, number: int, *arguments: str) -> None:
    """Run the command and be killed by signal ``number`` when its progress reaches ``step``."""
    from kvq.commands import calibrate as command

    @contextlib.contextmanager
    def progress_bar(**settings):
        yield lambda done, total, what: os.kill(os.getpid(), number) if done >= step else None

    command.progress_bar = progress_bar
    calibrate(*arguments)


@pytest.fixture(scope="module")
def start():
    """``start(function, *arguments) -> Process``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kvq.cli", "kvq.calib.run", "kvq.commands.calibrate", "kvq.report.stats_tables"])

    def run(function, *arguments):
        process = context.Process(target=function, args=tuple(map(_plain, arguments)))
        process.start()
        return process

    return run


def _plain(argument):
    return argument if isinstance(argument, int) else str(argument)


@pytest.fixture
def finished(start):
    """``finished(*arguments)``: run the command to its end, which must be good; returns the seconds it took."""

    def run(*arguments) -> float:
        began = time.monotonic()
        process = start(calibrate, *arguments)
        process.join(120)
        assert process.exitcode == 0
        return time.monotonic() - began

    return run


@pytest.mark.long
def test_killed_at_random_moments_it_ends_with_the_same_file(start, finished, tiny_checkpoint, text, tmp_path):
    model, out, expected = tiny_checkpoint(layers=3), tmp_path / "stats", tmp_path / "expected"
    arguments = ("--data", text, *ARGUMENTS)
    seconds = finished(model, "-o", expected, *arguments)
    draw = random.Random()
    for _ in range(5):
        process = start(calibrate, model, "-o", out, *arguments)
        time.sleep(draw.uniform(0, seconds))
        process.kill()
        process.join()
        if not out.exists():
            continue
        # It was done before the kill: whole, and once more from the start.
        assert out.read_bytes() == expected.read_bytes()
        out.unlink()
    finished(model, "-o", out, *arguments)
    assert out.read_bytes() == expected.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["expected", "stats", "text.txt", "tiny"]


@pytest.mark.parametrize(("number", "mode"), [(signal.SIGKILL, ("--layer-by-layer",)), (signal.SIGINT, ())])
@pytest.mark.long
def test_what_was_done_is_not_done_again(start, finished, tiny_checkpoint, text, tmp_path, mode, number):
    """Killed at three moments of its progress, each time later, it always has less left to do."""
    model, out, expected = tiny_checkpoint(layers=3), tmp_path / "stats", tmp_path / "expected"
    state = tmp_path / ".stats.partial"
    kept = set()
    for step in (5, 11, 20):
        process = start(kill_at_step, step, int(number), model, "-o", out, "--data", text, *ARGUMENTS, *mode)
        process.join(120)
        assert process.exitcode == (-signal.SIGKILL if number == signal.SIGKILL else 130)
        assert not out.exists()
        kept.add(frozenset(path.name for path in state.iterdir()))
    assert len(kept) == 3
    assert all(kept)
    finished(model, "-o", out, "--data", text, *ARGUMENTS, *mode)
    finished(model, "-o", expected, "--data", text, *ARGUMENTS)
    assert out.read_bytes() == expected.read_bytes()
    assert not state.exists()


@pytest.fixture
def two(start, tmp_path_factory):
    """``two(*arguments) -> [(exit code, stdout, stderr)]`` of two processes that share the work."""

    def run(*arguments):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        folder = tmp_path_factory.mktemp("output")
        processes = [start(calibrate_as, rank, port, folder, *arguments) for rank in range(2)]
        for process in processes:
            process.join(120)
        said = [[(folder / f"{kind}-{rank}").read_text() for kind in ("out", "err")] for rank in range(2)]
        return [(process.exitcode, *texts) for process, texts in zip(processes, said)]

    return run


SHARED = (*ARGUMENTS, "--samples", "13", "--batch-size", "2")


@pytest.mark.long
def test_two_torchrun_processes_write_the_file_of_one(finished, tiny_checkpoint, text, tmp_path):
    model, out, expected = tiny_checkpoint(layers=2), tmp_path / "stats", tmp_path / "expected"
    finished(model, "-o", expected, "--data", text, *SHARED)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "kvq.cli"]
    command = [*launcher, "calibrate", model, "-o", out, "--data", text, *SHARED]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(map(str, command), capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("written to") == 1
    assert out.read_bytes() == expected.read_bytes()
    assert Stats.load(out).layers[0]["key.range"].count == 13 * 48
    assert sorted(p.name for p in tmp_path.iterdir()) == ["expected", "stats", "text.txt", "tiny"]


def test_what_one_process_began_two_finish(start, two, finished, tiny_checkpoint, text, tmp_path):
    model, out, expected = tiny_checkpoint(layers=2), tmp_path / "stats", tmp_path / "expected"
    arguments = ("--data", text, *SHARED)
    start(kill_at_step, 7, int(signal.SIGKILL), model, "-o", out, *arguments).join(120)
    assert (tmp_path / ".stats.partial").is_dir()
    assert [code for code, _, _ in two(model, "-o", out, *arguments, "--layer-by-layer")] == [0, 0]
    finished(model, "-o", expected, *arguments)
    assert out.read_bytes() == expected.read_bytes()


def test_an_error_of_one_process_is_said_once(two, tiny_checkpoint, tiny_model, tmp_path):
    """A token that only the second half of the text holds gives NaN, so that only the second process fails."""
    import torch

    model, out = tiny_model(), tmp_path / "stats"
    (tmp_path / "halves.txt").write_text("a" * 96 + "b" * 96)
    with torch.no_grad():
        # The tiny tokenizer has four special tokens before 'a'.
        model.model.embed_tokens.weight[5] = float("nan")
    arguments = ("--data", tmp_path / "halves.txt", "--samples", "4", "--seq-len", "48", "--batch-size", "1")
    first, second = two(tiny_checkpoint(model), "-o", out, *arguments)
    assert (first[0], second[0]) == (2, 2)
    assert [line for line in first[2].splitlines() if line.startswith("Error: ")] == [
        "Error: layer 0 gives hidden states that are NaN or Inf in windows 2 to 2: load the model in bfloat16 or "
        "float32, or check its weights."
    ]
    assert "Error" not in second[2]
    assert not out.exists()
