"""What the commands share: options, where results go, progress bars, and silence from the libraries."""

import contextlib
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvq.atomic import check_writable, write_atomically
from kvq.commands.estimate import Estimate
from kvq.errors import RecipeError
from kvq.progress import listening
from kvq.settings import read_yaml

if TYPE_CHECKING:
    from kvq.recipe import Recipe

NOISY_LOGGERS = ("transformers", "lm_eval", "lm-eval", "datasets", "huggingface_hub", "httpx", "accelerate", "filelock")


class Finite(click.FloatRange):
    """A number in a range, which NaN and infinity are not."""

    def convert(self, value, param, ctx):
        found = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{value!r} is no finite number.", param, ctx)
        return found


class Output:
    """Where a command's results go.

    ``target`` is None (tables on stdout), a file (tables on stdout, JSON in the file), or ``-``: then stdout carries
    one JSON object alone, and everything else goes to stderr.
    """

    def __init__(self, target: str | None):
        from rich.console import Console

        self.target = target
        self.stdout = sys.stdout
        self.console = Console(stderr=target == "-", highlight=False, markup=False, emoji=False)

    def show(self, *renderables: Any) -> None:
        for renderable in renderables:
            # Sentences are left to the terminal to wrap, so that what reads them sees one line.
            self.console.print(renderable, soft_wrap=isinstance(renderable, str))

    def write(self, data: dict[str, Any]) -> None:
        """Write the command's one JSON object, if it was asked for."""
        if self.target is None:
            return
        text = json.dumps(_finite(data), indent=2, default=str, allow_nan=False) + "\n"
        if self.target == "-":
            self.stdout.write(text)
            self.stdout.flush()
        else:
            write_atomically(Path(self.target), text)


def _finite(value: Any) -> Any:
    """The value with NaN and infinity as null, which is all that JSON has for them."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def comma_list(*names: str, **settings) -> Callable:
    """An option whose values are separated by commas, and which may be given several times; passed on as one text."""

    def joined(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> str | None:
        return ",".join(values) if values else None

    return click.option(*names, multiple=True, callback=joined, **settings)


def split_list(text: str | None) -> tuple[str, ...]:
    """The names of a ``comma_list``."""
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


def _open_output(context: click.Context, parameter: click.Parameter, value: str | None) -> Output:
    output = Output(value)
    if value == "-":
        # Libraries that print would break the one JSON object.
        context.with_resource(contextlib.redirect_stdout(sys.stderr))
    elif value is not None:
        check_writable(value)
    return output


def json_option(function: Callable) -> Callable:
    """Add ``--json`` and pass it on as ``output: Output``."""
    text = "Write the result as one JSON object to FILE, or to stdout with '-'."
    return click.option("--json", "output", metavar="FILE", callback=_open_output, help=text)(function)


def settings_option(function: Callable) -> Callable:
    """Add ``--set KEY=VALUE`` and pass it on as ``settings: dict``."""
    text = "Change one setting of the recipe, e.g. key.bits=4, tokens.sinks=4 or layers.0-1.key.bits=8; repeatable."
    return click.option("--set", "settings", metavar="KEY=VALUE", multiple=True, callback=_parse_settings, help=text)(
        function
    )


def _parse_settings(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
    settings = {}
    for text in values:
        key, sign, value = text.partition("=")
        if not sign or not key or not value:
            raise RecipeError(f"--set {text!r} is no setting: write KEY=VALUE, for example --set key.bits=4.")
        settings[key.strip()] = read_yaml(value, f"--set {text!r}: {value!r}")
    return settings


def chosen_recipe(name: str | None, settings: dict[str, Any]) -> "Recipe | None":
    """The recipe of ``--recipe`` with ``--set`` applied; None without ``--recipe``."""
    if name is None:
        if settings:
            raise RecipeError("--set changes a recipe and none is named: add --recipe NAME.")
        return None
    return named_recipe(name, settings)


def named_recipe(name: str, settings: dict[str, Any]) -> "Recipe":
    """A recipe with ``--set`` applied."""
    from kvq.recipe import load_recipe

    recipe = load_recipe(name)
    return recipe.override(settings) if settings else recipe


class _Notes(logging.Handler):
    """Warnings of kvq itself, one plain line each on whatever stderr is now."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(f"Note: {record.getMessage()}", err=True)


def quiet() -> None:
    """Silence what the libraries say while they work; kvq's own warnings stay, as notes."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.simplefilter("ignore")
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    own = logging.getLogger("kvq")
    if not any(isinstance(handler, _Notes) for handler in own.handlers):
        own.addHandler(_Notes())
    own.propagate = False


def quiet_transformers() -> None:
    """Switch off transformers' progress bars; separate from ``quiet`` because it imports transformers."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


@contextlib.contextmanager
def progress_bar(
    title: str = "", tokens: Mapping[str, int] | None = None, silent: bool = False
) -> Iterator[Callable[..., None]]:
    """A bar with tokens/s and time left, on stderr; silent when asked to be or when stderr is not a terminal.

    Yields ``step(done, total, what="")``, to be called first with what was done before this run; ``what`` names the
    part of the work that is running. tokens: of a whole part, for those whose speed is counted in tokens.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task):
            in_all, speed = (tokens or {}).get(running, 0), estimate.per_second
            return Text(f"{speed * in_all / task.total:,.0f} tokens/s" if speed and in_all and task.total else "")

    class Left(ProgressColumn):
        def render(self, task):
            left = estimate.left
            return Text("-:--:--" if left is None else str(timedelta(seconds=int(left))))

    estimate, running, whole = Estimate(), "", 0
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Speed(), Left())
    with Progress(*columns, console=console, disable=silent or not console.is_terminal, transient=True) as progress:
        task = progress.add_task(title, total=None)

        def step(done: int, total: int, what: str = "") -> None:
            # Another task starts its own bar, and with it its own estimate.
            nonlocal running, whole
            if what != running:
                running = what
                estimate.restart()
                progress.reset(task)
            whole = done
            estimate.at(done, total)
            progress.update(task, completed=done, total=total, description=f"{title} {what}".strip())

        def inside(steps: float) -> None:
            # Never back: parts of a step may each count from nothing.
            if estimate.begun is not None and estimate.done < whole + steps <= estimate.total:
                estimate.at(whole + steps, estimate.total)
                progress.update(task, completed=whole + steps)

        with contextlib.nullcontext() if progress.disable else listening(inside):
            yield step
