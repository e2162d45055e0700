"""``kvq export``: write a checkpoint whose KV cache is quantized wherever it is loaded."""

import click

from kvq.commands.common import (
    Output,
    chosen_recipe,
    json_option,
    quiet_transformers,
    settings_option,
)


@click.command("export")
@click.argument("model")
@click.option("--recipe", required=True, metavar="NAME|FILE", help="A shipped recipe, or a YAML file.")
@click.option("--stats", metavar="STATS", help="Statistics of 'kvq calibrate'; recipes with static scales need them.")
@click.option("-o", "--output", "out", metavar="DIR", help="Folder to write.")
@click.option(
    "--target",
    type=click.Choice(("kvq", "plain")),
    default="kvq",
    show_default=True,
    help="plain: an ordinary checkpoint, with all transforms of the recipe in its weights and nothing else of it.",
)
@click.option(
    "--fold/--no-fold", default=True, show_default=True, help="Put transforms into the weights where that is exact."
)
@settings_option
@click.option("--dry-run", is_flag=True, help="Print the memory plan and write nothing.")
@click.option("--force", is_flag=True, help="Replace DIR if it exists.")
@json_option
def command(
    model: str,
    recipe: str,
    stats: str | None,
    out: str | None,
    target: str,
    fold: bool,
    settings: dict,
    dry_run: bool,
    force: bool,
    output: Output,
) -> None:
    """Export MODEL with a recipe, as a folder that from_pretrained loads.

    Weight files are linked or copied unchanged, or rewritten where they take over transforms of the recipe; the logits
    are then compared with the original's before anything is written. DIR appears whole or not at all.

    \b
    Examples:
      kvq export builtin --recipe kivi2 --dry-run
      kvq export builtin --recipe kivi2 -o smollm2-kivi2
      kvq export ./my-model --recipe kivi2 --set key.bits=4 --set layers.0-1.value.bits=4 -o out
      kvq export ./my-model --recipe fp8 --stats stats.safetensors -o out
      kvq export ./my-model --recipe qoq4 --stats stats.safetensors --target plain -o easier-to-quantize
    """
    chosen = chosen_recipe(recipe, settings)
    if not dry_run and out is None:
        raise click.UsageError("-o DIR is missing: name the folder to write, or add --dry-run.")
    if target == "plain" and not fold:
        raise click.UsageError("--target plain is nothing without its folds: leave --no-fold out.")
    quiet_transformers()
    from kvq.calib.stats import Stats

    statistics = Stats.load(stats) if stats else None
    if dry_run:
        _dry_run(model, chosen, statistics, output)
    else:
        _export(model, chosen, statistics, out, output, force=force, target=target, fold=fold)


def _dry_run(model: str, recipe, stats, output: Output) -> None:
    from kvq.export.memory import memory_plan
    from kvq.models.describe import describe
    from kvq.models.resolve import load_config, resolve_model
    from kvq.report.tables import memory_table

    spec = describe(load_config(resolve_model(model)))
    if stats is not None:
        stats.check_model(spec)
    plan = memory_plan(spec, recipe).to_dict()
    output.show(memory_table(plan), "Dry run: nothing was written.")
    output.write({"dry_run": True, "model": model, "recipe": recipe.to_dict(), "memory": plan})


def _export(model: str, recipe, stats, out: str, output: Output, **settings) -> None:
    from kvq.export.exporter import export

    result = export(model, recipe, out, stats=stats, **settings).to_dict()
    plain = result["target"] == "plain"
    what = "the transforms of recipe" if plain else "recipe"
    bits = "" if plain else f" ({result['bits_per_element']:.2f} bits per element)"
    output.show(f"{model} with {what} {recipe.name!r} written to {out}{bits}.")
    output.show(*(f"Transforms: {line}." for line in result["folds"]))
    if result["check"]:
        check = result["check"]
        output.show(
            f"Checked on {check['tokens']} tokens: logits differ by {check['error']:.1e} of the largest; with rounded "
            f"weights KL {check['kl']:.1e} nats a token."
        )
    output.show("It loads without kvq." if plain else f"Try it: kvq generate {out} --prompt 'Hello'")
    output.write(result)
