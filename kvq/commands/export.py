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
@settings_option
@click.option("--dry-run", is_flag=True, help="Print the memory plan and write nothing.")
@click.option("--force", is_flag=True, help="Replace DIR if it exists.")
@json_option
def command(
    model: str,
    recipe: str,
    stats: str | None,
    out: str | None,
    settings: dict,
    dry_run: bool,
    force: bool,
    output: Output,
) -> None:
    """Export MODEL with a recipe, as a folder that from_pretrained loads.

    Weight files are linked or copied unchanged. DIR appears whole or not at all.

    \b
    Examples:
      kvq export builtin --recipe kivi2 --dry-run
      kvq export builtin --recipe kivi2 -o smollm2-kivi2
      kvq export ./my-model --recipe kivi2 --set key.bits=4 --set layers.0-1.value.bits=4 -o out
      kvq export ./my-model --recipe fp8 --stats stats.safetensors -o out
    """
    chosen = chosen_recipe(recipe, settings)
    if not dry_run and out is None:
        raise click.UsageError("-o DIR is missing: name the folder to write, or add --dry-run.")
    quiet_transformers()
    from kvq.calib.stats import Stats

    statistics = Stats.load(stats) if stats else None
    if dry_run:
        _dry_run(model, chosen, statistics, output)
    else:
        _export(model, chosen, statistics, out, force, output)


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


def _export(model: str, recipe, stats, out: str, force: bool, output: Output) -> None:
    from kvq.export.exporter import export

    result = export(model, recipe, out, stats=stats, force=force).to_dict()
    output.show(
        f"{model} with recipe {recipe.name!r} written to {out} ({result['bits_per_element']:.2f} bits per element).",
        f"Try it: kvq generate {out} --prompt 'Hello'",
    )
    output.write(result)
