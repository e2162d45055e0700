"""``kvq eval``: score a model while it reads its quantized cache."""

from dataclasses import replace
from typing import Any

import click

from kvq.commands.common import Output, chosen_recipe, json_option, progress_bar, quiet_transformers, settings_option
from kvq.commands.scoring import command_line, finish, scoring_options, settings_from


@click.command("eval")
@click.argument("model")
@click.option("--recipe", metavar="NAME|FILE", help="Recipe for a plain model; an export brings its own.")
@settings_option
@scoring_options
@click.option(
    "--require",
    "requirements",
    multiple=True,
    metavar="NAME<NUMBER",
    help="Exit with code 1 unless this holds with 95% confidence, e.g. 'kl<0.02', 'top1>0.97' or 'gsm8k.drop<0.01'; "
    "repeatable.",
)
@json_option
def command(
    model: str,
    recipe: str | None,
    settings: dict,
    requirements: tuple[str, ...],
    output: Output,
    **scoring: Any,
) -> None:
    """Score an export, or a plain MODEL with --recipe, while it reads its quantized cache.

    Every number stands beside the unquantized model's on the same requests, with the error of their difference. An
    interrupted run continues when the same command is given again.

    \b
    Modes, by what a scored token attends to:
      stream    what token-by-token decoding would have read (the default)
      prefill   the prompt exactly, the continuation through the packed prompt
      chunked   as stream, with the text fed in chunks
      simulate  everything quantized but the sinks, no exact window: for comparison with papers

    \b
    Examples:
      kvq eval smollm2-kivi2 --limit 4 --report report.html --open
      kvq eval builtin --recipe kivi4 --tasks perplexity --data book.txt --seq-len 2048
      kvq eval smollm2-kivi2 --tasks needle --lengths 1024,2048,4096,8192
      kvq eval smollm2-kivi2 --tasks arc_easy,gsm8k --task-data rows --num-fewshot 8 --limit 200
      kvq eval smollm2-kivi2 --tasks tasks/mine.yaml --limit 50
      kvq eval smollm2-kivi2 --limit 8 --require 'kl<0.3' --require 'top1>0.7'
    """
    chosen = chosen_recipe(recipe, settings)
    arguments = settings_from(scoring)
    quiet_transformers()
    from kvq import api
    from kvq.eval.gate import judge, parse_requirement
    from kvq.eval.task_files import task_names
    from kvq.report.results import eval_table

    names = tuple(task_names(arguments["tasks"]))
    wanted = [parse_requirement(text, names) for text in requirements]
    with progress_bar("Evaluating") as step:
        found = api.evaluate(model, recipe=chosen, progress=step, **arguments)
    result = replace(found, command=command_line()).to_dict()
    output.show(eval_table(result))
    output.write(result)
    finish([result], scoring, output)
    if result["partial"]:
        raise KeyboardInterrupt
    failed = [judgement for judgement in (judge(own, result) for own in wanted) if not judgement.holds]
    for judgement in failed:
        click.echo(f"Not met: {judgement.requirement} ({judgement.why}).", err=True)
    if failed:
        raise click.exceptions.Exit(1)
