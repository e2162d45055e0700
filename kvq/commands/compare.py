"""``kvq compare``: several exports, or several recipes on one model, beside one baseline."""

from dataclasses import replace
from typing import Any

import click

from kvq.commands.common import Output, comma_list, json_option, progress_bar, quiet_transformers, split_list
from kvq.commands.scoring import command_line, finish, scoring_options, settings_from


@click.command("compare")
@click.argument("models", nargs=-1, required=True, metavar="DIR...|MODEL")
@comma_list("--recipes", metavar="NAME|FILE,...", help="Recipes to put on one plain model.")
@scoring_options
@json_option
def command(models: tuple[str, ...], recipes: str | None, output: Output, **scoring: Any) -> None:
    """Score several exports, or one MODEL under several recipes, on the same requests.

    The unquantized model answers once, and everything is paired with its answers. Options are those of 'kvq eval'.

    \b
    Examples:
      kvq compare builtin --recipes int8,int4,kivi4,kivi2 --limit 4 --report report.html --open
      kvq compare smollm2-kivi4 smollm2-kivi2 --tasks perplexity,divergence,needle
    """
    arguments = settings_from(scoring)
    names = None
    if recipes is not None:
        names = split_list(recipes)
        if not names:
            raise click.UsageError("--recipes is empty: name one, for example --recipes kivi4,kivi2.")
    quiet_transformers()
    from kvq import api
    from kvq.eval.result import SCHEMA_VERSION
    from kvq.report.results import compare_table

    with progress_bar("Comparing") as step:
        found = api.compare(models, recipes=names, progress=step, **arguments)
    line = command_line()
    results = [replace(result, command=line).to_dict() for result in found]
    output.show(compare_table(results))
    output.write({"schema_version": SCHEMA_VERSION, "runs": results})
    finish(results, scoring, output)
    if any(result["partial"] for result in results):
        raise KeyboardInterrupt
