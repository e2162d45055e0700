"""What ``kvq eval`` and ``kvq compare`` share: the options of an evaluation, its progress, and its outputs."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from kvq.commands.common import Output, check_writable, comma_list, split_list, write_atomically

MODES = ("stream", "prefill", "chunked", "simulate")

_OPTIONS = (
    comma_list(
        "--tasks",
        default=("perplexity,divergence",),
        show_default=True,
        metavar="NAME,...",
        help="perplexity, divergence, needle, multi_key, variable_tracking, copy_json, copy_code, drift, "
        "speed, and lm-eval tasks by name or file (.yaml).",
    ),
    click.option(
        "--data",
        default="builtin",
        show_default=True,
        metavar="builtin|FILE|HUB_ID",
        help="Text to score, and to make generated texts of.",
    ),
    click.option(
        "--task-data",
        metavar="DIR",
        type=click.Path(),
        help="Folder with rows (arc_easy.jsonl, ...) for arc_easy, arc_challenge, hellaswag, piqa, boolq, "
        "gsm8k, lambada_openai and wikitext, so that these need no network.",
    ),
    click.option("--task-dir", metavar="DIR", type=click.Path(), help="Folder with lm-eval task files of your own."),
    click.option("--seq-len", type=click.IntRange(2), help="Tokens per window of the text."),
    click.option("--stride", type=click.IntRange(1), help="Tokens from one window to the next; scored once each."),
    comma_list("--lengths", metavar="N,...", help="Tokens of generated texts, e.g. 1024,8192."),
    click.option(
        "--limit",
        type=click.IntRange(1),
        help="Windows, generated texts per length, and documents of an lm-eval task, to score.",
    ),
    click.option("--num-fewshot", "fewshot", type=click.IntRange(0), help="Examples in each prompt of lm-eval tasks."),
    click.option(
        "--apply-chat-template",
        "chat",
        is_flag=True,
        help="Put prompts of lm-eval tasks through the model's chat template.",
    ),
    click.option(
        "--mode",
        type=click.Choice(MODES),
        default="stream",
        show_default=True,
        help="What the scored tokens attend to.",
    ),
    click.option("--chunk", default=512, show_default=True, type=click.IntRange(1), help="Tokens a chunk (chunked)."),
    click.option("--baseline", metavar="MODEL", help="Model to compare with, instead of the same weights unquantized."),
    click.option("--stats", metavar="STATS", help="Statistics of 'kvq calibrate', for recipes that need them."),
    click.option(
        "--batch-size",
        default=1,
        show_default=True,
        type=click.IntRange(1),
        help="Windows, or requests of an lm-eval task, per forward.",
    ),
    click.option("--seed", default=0, show_default=True, help="Seed of generated texts and of tasks that sample."),
    click.option(
        "--cache",
        metavar="DIR",
        type=click.Path(),
        help="Folder for answers, so that an interrupted run continues [default: in the user's cache].",
    ),
    click.option("--no-cache", is_flag=True, help="Keep no answers, and use none."),
    click.option("--report", metavar="FILE", type=click.Path(), help="Write the results as one HTML page, too."),
    click.option("--open", "browse", is_flag=True, help="Open that page in the browser."),
)


def scoring_options(function: Callable) -> Callable:
    """Add the options; a command takes them as ``**scoring``, and calls ``settings_from`` on it."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def settings_from(scoring: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of ``evaluate`` and ``compare``; refuses what contradicts itself before any work."""
    names = split_list(scoring["tasks"])
    if not names:
        raise click.UsageError("--tasks is empty: name one, for example --tasks perplexity,divergence.")
    if scoring["no_cache"] and scoring["cache"]:
        raise click.UsageError("--cache and --no-cache contradict each other: leave one out.")
    if scoring["browse"] and not scoring["report"]:
        raise click.UsageError("--open shows the page of --report FILE: add --report.")
    if scoring["report"]:
        check_writable(scoring["report"])
        import kvq.report.drawing  # noqa: F401 - says what is missing
    from kvq.calib.stats import Stats

    passed = ("data", "task_data", "task_dir", "seq_len", "stride", "limit", "fewshot", "chat", "mode", "chunk")
    passed += ("baseline", "batch_size", "seed")
    settings = {name: scoring[name] for name in passed} | {"tasks": names, "lengths": _lengths(scoring["lengths"])}
    settings["stats"] = Stats.load(scoring["stats"]) if scoring["stats"] else None
    if scoring["no_cache"] or scoring["cache"]:
        settings["cache"] = scoring["cache"]
    return settings


def _lengths(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise click.UsageError(
            f"--lengths {text!r} is no list of numbers: write for example --lengths 1024,8192."
        ) from None


def command_line() -> str:
    """The running command with what was changed, as a reader can repeat it: paths lose their folders."""
    context = click.get_current_context()
    words = ["kvq", context.info_name or ""]
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if isinstance(parameter, click.Argument):
            words += [_name_only(own) for own in (value if isinstance(value, tuple) else (value,))]
        elif context.get_parameter_source(parameter.name or "") is click.core.ParameterSource.COMMANDLINE:
            words += _option(parameter, value)
    return shlex.join(words)


# Where results go, and what is required of them, does not change them.
_OUTPUTS = ("output", "report", "browse", "cache", "no_cache", "requirements")


def _option(parameter: click.Parameter, value: Any) -> list[str]:
    if parameter.name in _OUTPUTS:
        return []
    if isinstance(parameter, click.Option) and parameter.is_flag:
        return [parameter.opts[-1]]
    if isinstance(value, dict):
        return [word for key, own in value.items() for word in (parameter.opts[0], f"{key}={own}")]
    return [parameter.opts[0], ",".join(map(_name_only, value)) if isinstance(value, tuple) else _name_only(value)]


def _name_only(value: Any) -> str:
    text = str(value)
    if Path(text).expanduser().exists():
        return Path(text).name
    # Lists may hold files, too.
    return ",".join(map(_name_only, text.split(","))) if "," in text else text


def finish(results: list[dict[str, Any]], scoring: dict[str, Any], output: Output) -> None:
    """Write the report, if it was asked for, and show where it is."""
    if not scoring["report"]:
        return
    from kvq.report.html import html_report

    path = Path(scoring["report"])
    write_atomically(path, html_report(results))
    output.show(f"Report written to {path}.")
    if scoring["browse"]:
        click.launch(path.resolve().as_uri())
