"""``kvq search``: mixed precision chosen by measurement."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import click

from kvq.commands.common import Output, check_writable, json_option, progress_bar, quiet_transformers, write_atomically
from kvq.errors import DataError


@click.command("search")
@click.argument("model")
@click.option("--stats", metavar="STATS", help="Statistics of 'kvq calibrate', for transforms that read them.")
@click.option(
    "--budget",
    "budgets",
    type=click.FloatRange(0, min_open=True),
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
@click.option("--data", default="builtin", show_default=True, metavar="builtin|FILE|HUB_ID", help="Text to measure on.")
@click.option("--verify-data", metavar="FILE|HUB_ID", help="Text that confirms, instead of a part of --data.")
@click.option("--tokens", type=click.IntRange(64), help="Count bits in a filled cache of so many tokens instead.")
@click.option("--space", metavar="FILE", help="Search space, instead of the default.")
@click.option("--seq-len", default=2048, show_default=True, type=click.IntRange(64), help="Tokens per window.")
@click.option("--windows", default=1, show_default=True, type=click.IntRange(1), help="Windows for sensitivities.")
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
@click.option("--time-limit", type=click.FloatRange(0, min_open=True), metavar="MINUTES", help="Bound the measuring.")
@click.option("--seed", default=0, show_default=True, help="Seed of the choice of windows.")
@json_option
def command(model: str, out: str, stats: str | None, space: str | None, output: Output, **given: Any) -> None:
    """Search the recipe of least damage for MODEL within a budget of bits.

    Measures what each layer, side and head suffers from each option, allocates the bits, verifies candidates on text
    that the measuring did not see, and writes the chosen recipe, FILE, with its evidence and the front beside it:
    FILE.evidence.json, FILE.front.png and .html. Interrupted, it goes on where it was when it is called again.

    \b
    Examples:
      kvq calibrate builtin -o stats.safetensors --full
      kvq search builtin --stats stats.safetensors --budget 2.5 -o mine.yaml
      kvq search builtin --stats stats.safetensors --budget 4.5 --budget 2.5 -o "mine-{budget}.yaml" --time-limit 30
    """
    budgets = given.pop("budgets")
    targets = _targets(out, budgets)
    if importlib.util.find_spec("scipy") is None or importlib.util.find_spec("matplotlib") is None:
        raise DataError("'kvq search' needs scipy and matplotlib: pip install 'kvq-toolkit[search]'.")
    quiet_transformers()
    from kvq.calib.stats import Stats
    from kvq.report.search_tables import search_table
    from kvq.searching.evidence import evidence, front_rows
    from kvq.searching.search import Settings, search
    from kvq.searching.space import load_space
    from kvq.searching.verify import parse_floors

    data = {name: given.pop(name) for name in ("data", "verify_data")}
    minutes = given.pop("time_limit")
    floors = parse_floors(given.pop("floors"))
    settings = Settings(budgets=budgets, floors=floors, time_limit=None if minutes is None else 60 * minutes, **given)
    journal = _beside(Path(out.replace("{budget}", "all")), ".journal.jsonl")
    with progress_bar("Search:") as bar:
        found = search(
            model,
            settings,
            stats=Stats.load(stats) if stats else None,
            space=load_space(space),
            journal=journal,
            names=lambda budget: targets[budget].stem,
            progress=lambda stage, done, total: bar(done, total, stage),
            **data,
        )
    _write(found, targets, out)
    journal.unlink(missing_ok=True)
    front = front_rows(found)
    output.show(search_table(front))
    for name, why in found.left_out.items():
        output.show(f"Left out: {name}: {why}")
    for point in found.points:
        output.show(f"Wrote {targets[point.budget]}")
    output.show(f"Measured for {found.seconds / 60:.1f} minutes.")
    output.write({**front, "evidence": [evidence(found, point, _command()) for point in found.points]})


def _targets(out: str, budgets: tuple[float, ...]) -> dict[float, Path]:
    """The recipe file of every budget."""
    if len(set(budgets)) > 1 and "{budget}" not in out:
        raise click.UsageError("several budgets need a name each: write for example -o 'mine-{budget}.yaml'.")
    targets = {budget: Path(out.replace("{budget}", f"{budget:g}")) for budget in budgets}
    for path in targets.values():
        if path.suffix not in (".yaml", ".yml"):
            raise click.UsageError(f"-o {out!r} is no recipe file: end it in .yaml.")
        check_writable(path)
    return targets


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.stem + ending)


def _command() -> list[str]:
    """The command line without folders of this machine."""
    return ["kvq", *(word if "/" not in word else Path(word).name for word in sys.argv[1:])]


def _write(found, targets: dict[float, Path], out: str) -> None:
    """Pictures and evidence first, so that a recipe never stands without them."""
    import json

    from kvq.report.front import front_html, front_png
    from kvq.searching.evidence import evidence, front_rows, recipe_text

    front = front_rows(found)
    png = front_png(front)
    shared = Path(out.replace("{budget}", "all"))
    write_atomically(_beside(shared, ".front.png"), png)
    write_atomically(_beside(shared, ".front.html"), front_html(front, png))
    for point in found.points:
        path = targets[point.budget]
        proof = _beside(path, ".evidence.json")
        write_atomically(proof, json.dumps(evidence(found, point, _command()), default=str) + "\n")
        write_atomically(path, recipe_text(point.chosen.recipe, point, proof.name))
