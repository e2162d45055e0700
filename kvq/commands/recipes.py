"""``kvq recipes list | show | check``: the shipped recipes, and yours."""

from typing import Any

import click

from kvq.commands.common import Output, json_option, named_recipe, settings_option


@click.group("recipes")
def command() -> None:
    """List, show and check recipes.

    \b
    Examples:
      kvq recipes list
      kvq recipes show kivi2 > mine.yaml
      kvq recipes check mine.yaml --model builtin
    """


@command.command("list")
@json_option
def list_command(output: Output) -> None:
    """List the shipped recipes, those to begin with first."""
    from kvq.recipes import headline, list_recipes, recommended
    from kvq.report.tables import recipes_table, recommended_table

    rows, first = [headline(name) for name in list_recipes()], recommended()
    output.show(*recommended_table(first), recipes_table(rows))
    if output.target is not None:
        # A hash is of a recipe that was checked, and its codecs import torch.
        from kvq.recipe import load_recipe

        output.write({"recommended": first, "recipes": [row | {"hash": load_recipe(row["name"]).hash} for row in rows]})


@command.command("show")
@click.argument("recipe", metavar="NAME|FILE")
@settings_option
@json_option
def show(recipe: str, settings: dict, output: Output) -> None:
    """Print a recipe as YAML, ready to be copied and changed.

    \b
    Examples:
      kvq recipes show kivi2
      kvq recipes show kivi2 --set key.bits=4 > mine.yaml
    """
    loaded = named_recipe(recipe, settings)
    # Not through rich, which would wrap long lines.
    click.echo(loaded.to_yaml(), nl=False)
    output.write({"recipe": loaded.to_dict(), "hash": loaded.hash})


@command.command("check")
@click.argument("recipe", metavar="NAME|FILE")
@click.option("--model", metavar="MODEL", help="Also check that the recipe fits this model.")
@settings_option
@json_option
def check(recipe: str, model: str | None, settings: dict, output: Output) -> None:
    """Check a recipe: its settings, its layer patterns and, with --model, its fit.

    \b
    Examples:
      kvq recipes check mine.yaml
      kvq recipes check mine.yaml --model builtin
    """
    loaded = named_recipe(recipe, settings)
    result: dict[str, Any] = {"name": loaded.name, "valid": True, "hash": loaded.hash}
    said = f"Recipe {loaded.name!r} is valid"
    if model is not None:
        from kvq import api

        plan = api.memory_plan(model, loaded).to_dict()
        layers = sum(row["layers"] for row in plan["layer_kinds"] if row["kind"] == "packed")
        result["model"] = {"name": model, "quantized_layers": layers, "memory": plan}
        said += f" and fits {model}: {layers} layers quantized, {plan['bits_per_element']:.2f} bits per element"
    click.echo(f"{said}. Hash {loaded.hash[:12]}.")
    output.write(result)
