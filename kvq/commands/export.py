"""``kvq export``: write a checkpoint whose KV cache is quantized wherever it is loaded."""

from typing import TYPE_CHECKING, Any

import click

from kvq.commands.common import (
    Output,
    json_option,
    named_recipe,
    progress_bar,
    quiet_transformers,
    settings_option,
)
from kvq.errors import KvqError

if TYPE_CHECKING:
    from kvq.recipe import Recipe


def _list_targets(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if not value:
        return
    from kvq.exporting.targets import TARGETS

    for target in TARGETS.values():
        click.echo(f"{target.name:20}{target.summary}")
    context.exit()


@click.command("export")
@click.argument("model")
@click.option("--recipe", required=True, metavar="NAME|FILE", help="A shipped recipe, or a YAML file.")
@click.option("--stats", metavar="STATS", help="Statistics of 'kvq calibrate'; recipes with static scales need them.")
@click.option("--target", default="kvq", show_default=True, metavar="NAME", help="For whom; see --list-targets.")
@click.option("--other-weights", is_flag=True, help="Take statistics of other weights, such as the unquantized base's.")
@click.option(
    "--fold/--no-fold", default=True, show_default=True, help="Put transforms into the weights where that is exact."
)
@click.option(
    "--results",
    multiple=True,
    metavar="FILE",
    help="Results of 'kvq eval MODEL --recipe ... --json' for the model card; repeatable.",
)
@click.option("-o", "--output", "out", metavar="DIR", help="Folder to write.")
@settings_option
@click.option("--dry-run", is_flag=True, help="Print the memory plan and write nothing.")
@click.option("--force", is_flag=True, help="Replace DIR if it exists.")
@click.option(
    "--list-targets",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list_targets,
    help="List the targets, and exit.",
)
@json_option
def command(
    model: str, recipe: str, out: str | None, settings: dict, dry_run: bool, output: Output, **given: Any
) -> None:
    """Export MODEL with a recipe, as a folder that from_pretrained or a serving engine loads.

    Weight files are linked or copied unchanged, or rewritten where they take over transforms of the recipe; then the
    export is refused if the logits are not the original's. DIR appears whole or not at all.

    \b
    Examples:
      kvq export builtin --recipe kivi2 --dry-run
      kvq export builtin --recipe kivi2 -o smollm2-kivi2
      kvq export ./my-model --recipe kivi2 --set key.bits=4 --set layers.0-1.value.bits=4 -o out
      kvq export builtin --recipe kivi2 --results result.json -o smollm2-kivi2
      kvq export ./my-model --recipe fp8 --stats stats.safetensors -o out
      kvq export ./my-model --recipe fp8 --stats stats.safetensors --target vllm -o out-vllm
      kvq export ./my-model --recipe qoq4 --stats stats.safetensors --target plain -o easier-to-quantize
    """
    chosen = named_recipe(recipe, settings)
    if out is None and not dry_run:
        raise click.UsageError("-o DIR is missing: name the folder to write, or add --dry-run.")
    quiet_transformers()
    from kvq import api

    danger = _danger(model, chosen)
    if danger is not None:
        output.show(danger)
    if dry_run or out is None:
        _dry_run(model, chosen, given["stats"], output)
        return
    with progress_bar() as step:
        result = api.export(model, out, recipe=chosen, progress=step, **given).to_dict()
    ours = result["target"] == "kvq"
    output.show(f"{model} with recipe {chosen.name!r} written to {out} ({_what(result)}).")
    output.show(*(f"Transforms: {line}." for line in result["folds"]))
    if result["check"]:
        check = result["check"]
        output.show(
            f"Checked on {check['tokens']} tokens: logits differ by {check['error']:.1e} of the largest; with rounded "
            f"weights KL {check['kl']:.1e} nats a token (random changes of that size: {check['noise_kl']:.1e})."
        )
    output.show(f"Try it: kvq generate {out} --prompt 'Hello'" if ours else f"See what loads it: kvq check {out}")
    output.write(result)


def _danger(model: str, recipe: "Recipe") -> str | None:
    """What the weights say against the recipe, before anything is written; None if they say nothing."""
    from kvq.diagnosis.causes import causes_of_weights, endangered
    from kvq.models.describe import describe
    from kvq.models.resolve import check_weights, load_config, resolve_model
    from kvq.models.stored import Weights

    try:
        folder = resolve_model(model)
        spec = describe(load_config(folder))
        check_weights(folder)
    except KvqError:
        # Who exports says it, and a dry run needs no weights.
        return None
    cause = endangered(recipe, causes_of_weights(spec, Weights(folder)))
    if cause is None:
        return None
    return f"Warning: recipe {recipe.name!r} is likely to ruin this model: {cause.text}; {cause.advice}."


def _dry_run(model: str, recipe, stats: str | None, output: Output) -> None:
    from kvq import api
    from kvq.calib.stats import Stats
    from kvq.report.tables import memory_table

    spec = api.describe(model)
    if stats is not None:
        Stats.load(stats).check_model(spec)
    plan = api.memory_plan(spec, recipe).to_dict()
    output.show(memory_table(plan), "Dry run: nothing was written.")
    output.write({"dry_run": True, "model": model, "recipe": recipe.to_dict(), "memory": plan})


def _what(result: dict) -> str:
    if result["target"] == "plain":
        return "transforms in the weights, the cache is the engine's"
    return f"{result['bits_per_element']:.2f} bits per element"
