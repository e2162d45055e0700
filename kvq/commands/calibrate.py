"""``kvq calibrate``: run a model over text and save statistics of its attention."""

import sys
import time
from functools import partial
from pathlib import Path

import click

from kvq.commands.common import (
    Output,
    check_writable,
    comma_list,
    json_option,
    peak_memory,
    progress_bars,
    quiet_transformers,
)

USAGE_ERROR = 2
DTYPES = ("float32", "bfloat16", "float16")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


class Bytes(click.ParamType):
    """A size such as 8GB, 500MB or 6GiB."""

    name = "SIZE"

    def convert(self, value, parameter, context):
        if isinstance(value, int):
            return value
        text = value.strip().lower().removesuffix("b")
        digits = text.rstrip("kmgti")
        unit = text[len(digits) :]
        try:
            size = float(digits) * _UNITS[unit]
        except (ValueError, KeyError):
            self.fail(f"{value!r} is no size: write it as 8GB, 500MB or 6GiB", parameter, context)
        if size <= 0:
            self.fail(f"{value!r} is no size: it must be above 0", parameter, context)
        return int(size)


@click.command("calibrate")
@click.argument("model")
@click.option("-o", "--output", "out", metavar="STATS", required=True, help="File to write, e.g. stats.safetensors.")
@comma_list(
    "--for", "recipes", metavar="RECIPE,...", help="Measure only what these recipes (names or files) read, and learn."
)
@click.option(
    "--end-to-end", is_flag=True, help="With --for: learn transforms further, on the logits of the whole model."
)
@click.option("--full", is_flag=True, help="Measure everything, second moments and token vectors too.")
@click.option("--data", default="builtin", show_default=True, metavar="builtin|FILE|HUB_ID", help="Calibration text.")
@click.option("--field", metavar="COLUMN", help="Column of the text.  [default: messages, else text]")
@click.option("--split", default="train", show_default=True, help="Split of a hub data set.")
@click.option("--chat-template", is_flag=True, help="Put texts into the model's chat template, as a user's messages.")
@click.option("--per-document", is_flag=True, help="A window for each document, instead of packed windows.")
@click.option("--samples", default=64, show_default=True, type=click.IntRange(1), help="Windows of text.")
@click.option("--seq-len", default=512, show_default=True, type=click.IntRange(2), help="Tokens per window.")
@click.option("--seed", default=0, show_default=True, help="Seed of the choice of windows.")
@click.option("--batch-size", default=8, show_default=True, type=click.IntRange(1), help="Windows per forward.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Of the weights.  [default: float32 on the CPU]")
@click.option("--device-map", metavar="auto|...", help="Spread the model over several GPUs, as from_pretrained does.")
@click.option("--layer-by-layer", is_flag=True, help="Keep one decoder layer at a time in memory, the rest on disk.")
@click.option("--memory-limit", type=Bytes(), help="Go layer by layer if the model takes more, e.g. 8GB.")
@click.option(
    "--reservoir", default="512MB", show_default=True, type=Bytes(), help="Token vectors to keep, all layers together."
)
@json_option
def command(model: str, out: str, recipes: str | None, full: bool, output: Output, **settings) -> None:
    """Measure keys, values and queries of MODEL over text, and save the statistics.

    Without --for or --full: ranges, quantiles, attention sinks and massive activations. With --for, transforms that are
    learned are learned too, layer by layer. An interrupted run continues when the same command is given again.

    \b
    Examples:
      kvq calibrate builtin -o stats.safetensors
      kvq calibrate ./my-model -o stats.safetensors --data chats.jsonl --samples 128 --full
      kvq calibrate ./large-model -o stats.safetensors --memory-limit 16GB
      kvq calibrate builtin -o stats.safetensors --for fp8
      kvq calibrate builtin -o stats.safetensors --for spinquant3,qoq4

    Several processes share the windows under torchrun:

    \b
      torchrun --nproc-per-node 2 -m kvq.cli calibrate ./my-model -o stats.safetensors
    """
    if settings["end_to_end"] and not recipes:
        raise click.UsageError("--end-to-end learns what a recipe asks for: name one with --for.")
    if recipes and full:
        raise click.UsageError("--for and --full exclude each other: leave one of them out.")
    check_writable(out)
    quiet_transformers()
    from kvq.calib.ranks import ranks
    from kvq.errors import KvqError

    with ranks() as processes:
        try:
            _calibrate(model, Path(out), _split(recipes), full, processes, output, settings)
        except KvqError:
            # All processes fail alike, and one of them says so.
            if processes.is_first:
                raise
            sys.exit(USAGE_ERROR)


def _calibrate(
    model: str, path: Path, recipes: tuple[str, ...], full: bool, processes, output: Output, settings
) -> None:
    from kvq.calib.calibrate import by_layer, calibrate
    from kvq.calib.data import load_documents
    from kvq.calib.windows import token_windows
    from kvq.models.describe import describe
    from kvq.models.resolve import load_config, load_tokenizer, resolve_model
    from kvq.report.learned_tables import learned_table, learning_line
    from kvq.report.stats_tables import stats_rows, stats_table

    folder = resolve_model(model)
    spec = describe(load_config(folder))
    options = _options(recipes, full, spec, settings)
    one_layer = by_layer(folder, options, processes)
    tokenizer = load_tokenizer(folder)
    windows = token_windows(
        tokenizer,
        load_documents(settings["data"], field=settings["field"], split=settings["split"]),
        samples=settings["samples"],
        seq_len=settings["seq_len"],
        seed=settings["seed"],
        source=settings["data"],
        packed=not settings["per_document"],
        chat_template=settings["chat_template"],
    )
    state_folder = path.with_name(f".{path.name}.partial")
    tokens_per_step = windows.identity.tokens / len(windows.tokens) * processes.world
    bars = {"tokens_per_step": tokens_per_step, "silent": not processes.is_first}
    with progress_bars("Calibrating", "Learning codebooks", **bars) as (step, learning):
        stats = calibrate(
            folder,
            windows,
            options,
            state_folder=state_folder,
            progress=step,
            learning=learning,
            ranks=processes,
            model_name=Path(model).name,
            tokenizer=tokenizer,
        )
    if stats is None:
        return
    tokens = windows.tokens if settings["end_to_end"] else None
    stats, times = _learn(stats, options.recipes, spec, folder, state_folder, tokens)
    stats.save(path)
    _remove(state_folder)
    data = stats.data
    output.show(stats_table(stats_rows(stats)), *_notes(stats))
    transforms = [fit.facts for fit in stats.fits.values() if "objective" in fit.facts]
    if transforms:
        output.show(learned_table(transforms), *(learning_line(**entry) for entry in times))
    output.show(f"Statistics of {data.samples} windows, {data.tokens:,} tokens, written to {path}.")
    output.write(
        {
            "stats": str(path),
            "layers": len(stats.layers),
            "tokens": data.tokens,
            "needs": sorted(stats.needs),
            "fits": {name: fit.facts for name, fit in stats.fits.items()},
            "learning": times,
            "missing": dict(stats.missing),
            "processes": processes.world,
            "layer_by_layer": one_layer,
            **stats.provenance(),
        }
    )


def _split(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


def _learn(stats, recipes, spec, folder: Path, state_folder: Path, tokens=None):
    """The statistics with what the recipes' learned transforms learn on them, and the time and memory that took.

    tokens   [N, T] to learn end to end afterwards.
    """
    from kvq.calib.learn import learn_fits, learned_steps

    loaded = [recipe for recipe in recipes if any(learned_steps(recipe, spec))]
    learning = []

    def timed(what: str, title: str, learn):
        start = time.perf_counter()
        with progress_bars(title) as (step,):
            found = learn(state_folder=state_folder, progress=step)
        learning.append({"what": what, "seconds": time.perf_counter() - start, "peak_bytes": peak_memory()})
        return found

    for recipe in loaded:
        stats = timed(
            f"{recipe.name} layer by layer", "Learning transforms", partial(learn_fits, recipe, spec, stats, folder)
        )
    if tokens is not None and loaded:
        from kvq.calib.end_to_end import learn_end_to_end
        from kvq.models.resolve import load_model

        model = load_model(folder)
        for recipe in loaded:
            learn = partial(learn_end_to_end, model, recipe, stats, tokens, folder)
            stats = timed(f"{recipe.name} end to end", "Learning end to end", learn)
    return stats, learning


def _options(recipes: tuple[str, ...], full: bool, spec, settings):
    import torch

    from kvq.cache.plan import check_transforms
    from kvq.calib.calibrate import Options
    from kvq.calib.needs import ALL_NEEDS, DEFAULT_NEEDS, needs_of
    from kvq.errors import RecipeError
    from kvq.recipe import load_recipe

    needs = ALL_NEEDS if full else DEFAULT_NEEDS
    loaded = tuple(load_recipe(recipe) for recipe in recipes)
    if loaded:
        for recipe in loaded:
            check_transforms(recipe, spec)
        needs = frozenset().union(*(needs_of(recipe, spec) for recipe in loaded))
        if not needs:
            raise RecipeError(
                f"recipe {', '.join(map(repr, recipes))} reads no statistics: use it as it is, or calibrate without "
                "--for."
            )
    return Options(
        needs=needs,
        strict=bool(recipes),
        batch_size=settings["batch_size"],
        seed=settings["seed"],
        reservoir_bytes=settings["reservoir"],
        dtype=getattr(torch, settings["dtype"]) if settings["dtype"] else None,
        device_map=settings["device_map"],
        layer_by_layer=True if settings["layer_by_layer"] else None,
        memory_limit=settings["memory_limit"],
        recipes=loaded,
    )


def _notes(stats) -> list[str]:
    """What could not be measured, a line for each reason."""
    reasons: dict[str, list[str]] = {}
    for need, why in sorted(stats.missing.items()):
        reasons.setdefault(why, []).append(need)
    return [f"Not measured: {', '.join(needs)}, because {why}" for why, needs in reasons.items()]


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
