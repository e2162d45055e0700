"""``kvq check``: will a folder load in a serving engine, with which cache, and was every scale found."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import click

from kvq.commands.common import Output, json_option, progress_bar, quiet_transformers
from kvq.errors import CheckpointError


@click.command("check")
@click.argument("folder", metavar="DIR")
@click.option("--engine", metavar="NAME", help="vllm, sglang or transformers; without it, each of them.")
@click.option("--engine-version", "version", metavar="V", help="Its release; without it, the newest that kvq knows.")
@click.option("--run", "start", is_flag=True, help="Start the real engine (vllm) on two prompts and compare.")
@click.option(
    "--engine-python", metavar="PYTHON", help="Interpreter of the environment that has the engine, for --run."
)
@click.option("--dtype", default="auto", show_default=True, help="Of the model in the engine, for --run.")
@click.option("--quick", is_flag=True, help="Compare weight files by size, not by hash.")
@json_option
def command(
    folder: str,
    engine: str | None,
    version: str | None,
    start: bool,
    engine_python: str | None,
    dtype: str,
    quick: bool,
    output: Output,
) -> None:
    """Check, without the engine, whether DIR loads in it, with which cache, and whether every scale is found.

    Every file is compared with the hashes that the export wrote. The folder must load in the engine that it was written
    for, a stranger's folder in one of them: what prevents that is an error, and ends with exit code 2; what another
    engine says is a note. With --engine the shipped recipes that this engine can have are listed, and why it cannot
    have the others. With --run the engine is started: its scales must be the folder's, and its answers those of kvq's
    simulation.

    \b
    Examples:
      kvq check smollm2-fp8
      kvq check smollm2-fp8 --engine vllm --engine-version 0.33
      kvq check ./someones-fp8-model --quick --json -
      kvq check smollm2-fp8 --run --engine-python .venv-vllm/bin/python
    """
    if version and not engine:
        raise click.UsageError("--engine-version needs --engine NAME beside it.")
    if start:
        engine = engine or "vllm"
        _check_runnable(engine, engine_python)
    quiet_transformers()
    from kvq.exporting.check import check_folder, passes, settled, verdict
    from kvq.exporting.engines import engines, find_release
    from kvq.report.engines import engines_table, expressible_table, findings_table, serve_lines

    releases = [find_release(engine, version)] if engine else [find_release(name) for name in engines()]
    with progress_bar("Hashing") as step:
        reports = check_folder(Path(folder).expanduser(), releases, quick=quick, progress=step)
    rows = [report.to_dict() for report in settled(reports)]
    output.show(engines_table(f"Check of {rows[0]['folder']}", rows), *serve_lines(rows))
    if any(row["findings"] for row in rows):
        output.show(findings_table(rows))
    if engine:
        output.show(expressible_table(f"Recipes in {releases[0].name}", rows[0]["recipes"]))
    result: dict[str, Any] = {"folder": folder, "passes": passes(reports), "engines": rows}
    if not result["passes"]:
        output.write(result)
        raise CheckpointError(verdict(folder, reports))
    if start:
        result["run"] = _run(folder, reports[0], releases[0], engine_python, dtype, output)
        result["passes"] = not result["run"]["problems"]
    output.write(result)
    if not result["passes"]:
        raise CheckpointError(f"{folder!r} fails in {engine}: {' '.join(result['run']['problems'])}")


def _check_runnable(engine: str, python: str | None) -> None:
    if engine != "vllm":
        raise click.UsageError(f"--run starts vllm only, not {engine}.")
    if python is None and importlib.util.find_spec("vllm") is None:
        raise click.UsageError("vllm is not installed here: name the Python of its environment with --engine-python.")


def _run(folder: str, report, release, python: str | None, dtype: str, output: Output) -> dict[str, Any]:
    from kvq.eval.engine_run import compare_with_engine, two_prompts
    from kvq.report.engines import comparison_table

    path, flag = Path(folder).expanduser(), report.flag
    if flag in release.own:
        output.show(f"Run with a cache in 16 bits: what {flag} makes of a number is {release.title}'s own.")
        flag = None
    settings = {"dtype": dtype, "cache_dtype": flag, "skip": report.skip}
    found = compare_with_engine(path, two_prompts(path), python=python or sys.executable, **settings).to_dict()
    output.show(comparison_table(found))
    return found
