"""``kvq search``: mixed precision chosen by measurement."""

import sys
from pathlib import Path
from typing import Any

import click

from kvq.commands.common import Finite, Output, json_option, progress_bar, quiet_transformers


@click.command("search")
@click.argument("model")
@click.option("--stats", metavar="STATS", help="Statistics of 'kvq calibrate', for transforms that read them.")
@click.option(
    "--budget",
    "budgets",
    type=Finite(0, min_open=True),
    multiple=True,
    required=True,
    metavar="BITS",
    help="Bits per number, codes and all metadata, keys and values averaged; repeatable.",
)
@click.option("-o", "--out", required=True, metavar="FILE", help="Recipe to write; '{budget}' stands for the budget.")
@click.option("--metric", default="kl", show_default=True, type=click.Choice(("kl", "top1")), help="What is minimised.")
@click.option(
    "--floor", "floors", multiple=True, metavar="METRIC=VALUE", help="What must hold, e.g. top1=0.95; repeatable."
)
@click.option(
    "--data",
    default=("builtin",),
    show_default=True,
    multiple=True,
    metavar="builtin|FILE|HUB_ID",
    help="Text to measure on; repeatable.",
)
@click.option(
    "--verify-data",
    multiple=True,
    metavar="FILE|HUB_ID",
    help="Text that confirms; repeatable. While there are fewer than two, parts of --data do so too.",
)
@click.option("--tokens", type=click.IntRange(64), help="Count bits in a filled cache of so many tokens instead.")
@click.option("--space", metavar="FILE", help="Search space, instead of the default.")
@click.option("--seq-len", default=2048, show_default=True, type=click.IntRange(64), help="Tokens per window.")
@click.option(
    "--context", type=click.IntRange(64), help="Measure at positions up to so many tokens, instead of from 0 on."
)
@click.option(
    "--windows", default=1, show_default=True, type=click.IntRange(1), help="Windows of each text for sensitivities."
)
@click.option(
    "--verify-windows", default=4, show_default=True, type=click.IntRange(1), help="Windows to choose, and to confirm."
)
@click.option(
    "--anchors", default=3, show_default=True, type=click.IntRange(2), help="Options measured per side and layer."
)
@click.option("--heads/--no-heads", default=True, show_default=True, help="Give heads options of their own.")
@click.option(
    "--refine", default=4, show_default=True, type=click.IntRange(0), help="Rounds of measuring what was chosen."
)
@click.option("--time-limit", type=Finite(0, min_open=True), metavar="MINUTES", help="Bound the search.")
@click.option("--seed", default=0, show_default=True, help="Seed of the choice of windows.")
@json_option
def command(model: str, out: str, output: Output, **given: Any) -> None:
    """Search the recipe of least damage for MODEL within a budget of bits.

    Measures what each layer, side and head suffers from each option, allocates the bits, and verifies candidates on
    text that the measuring did not see, at last on two held-out texts, also with transforms fitted to another text:
    what does not lead on both leaves the place to the best recipe that treats all layers alike. Writes the chosen
    recipe, FILE, with its evidence and the front beside it: FILE.evidence.json, FILE.front.png and .html. Interrupted,
    it goes on where it was when it is called again; cut by --time-limit, it writes what it has found and does the same.

    \b
    Examples:
      kvq calibrate builtin -o stats.safetensors --full
      kvq search builtin --stats stats.safetensors --budget 2.5 -o mine.yaml
      kvq search builtin --stats stats.safetensors --budget 4.5 --budget 2.5 -o "mine-{budget}.yaml" --time-limit 30
    """
    quiet_transformers()
    from kvq import api
    from kvq.report.search_files import SearchFiles
    from kvq.report.tables import search_table
    from kvq.searching.search_evidence import evidence, front_rows
    from kvq.searching.verify import parse_floors

    minutes, budgets = given.pop("time_limit"), given.pop("budgets")
    files, line = SearchFiles.of(out, budgets), _command()
    with progress_bar("Search:") as step:
        found = api.search(
            model,
            budget=budgets,
            floors=parse_floors(given.pop("floors")),
            time_limit=None if minutes is None else 60 * minutes,
            out=out,
            command=line,
            progress=step,
            **given,
        )
    front = front_rows(found)
    output.show(search_table(front))
    for name, why in found.left_out.items():
        output.show(f"Left out: {name}: {why}")
    for point in found.points:
        if point.lost is not None:
            output.show(f"At {point.budget:g} bits one way for all layers won: what was found led on one text only.")
        output.show(f"Wrote {files.recipes[point.budget]}")
    output.show(f"Measured for {found.seconds / 60:.1f} minutes.")
    if not found.complete:
        output.show("The time limit cut the search: call it again to go on where it was.")
    output.write({**front, "evidence": [evidence(found, point, line) for point in found.points]})


def _command() -> list[str]:
    """The command line without folders of this machine."""
    return ["kvq", *(word if "/" not in word else Path(word).name for word in sys.argv[1:])]
