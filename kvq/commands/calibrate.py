"""``kvq calibrate``: run a model over text and save statistics of its attention."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from kvq.commands.common import (
    Output,
    check_writable,
    comma_list,
    json_option,
    progress_bar,
    quiet_transformers,
    split_list,
)

USAGE_ERROR = 2
_TEXT = ("data", "field", "split", "chat_template", "samples", "seq_len")
DTYPES = ("float32", "bfloat16", "float16")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


class Bytes(click.ParamType):
    """A size such as 8GB, 500MB or 6GiB."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        text = value.strip().lower().removesuffix("b")
        digits = text.rstrip("kmgti")
        unit = text[len(digits) :]
        try:
            size = float(digits) * _UNITS[unit]
        except (ValueError, KeyError):
            self.fail(f"{value!r} is no size: write it as 8GB, 500MB or 6GiB", param, ctx)
        if size <= 0:
            self.fail(f"{value!r} is no size: it must be above 0", param, ctx)
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
    "--reservoir",
    "reservoir_bytes",
    default="512MB",
    show_default=True,
    type=Bytes(),
    help="Token vectors to keep, all layers together.",
)
@json_option
def command(model: str, out: str, recipes: str | None, output: Output, **settings) -> None:
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
    if recipes and settings["full"]:
        raise click.UsageError("--for and --full exclude each other: leave one of them out.")
    check_writable(out)
    quiet_transformers()
    from kvq.calib.ranks import ranks
    from kvq.errors import KvqError

    with ranks() as processes:
        try:
            _calibrate(model, Path(out), split_list(recipes), processes, output, settings)
        except KvqError:
            # All processes fail alike, and one of them says so.
            if processes.is_first:
                raise
            sys.exit(USAGE_ERROR)


def _calibrate(model: str, path: Path, recipes: tuple[str, ...], processes, output: Output, settings) -> None:
    import torch

    from kvq.calib.run import CalibrationText, calibrate_folder, save, state_folder_of
    from kvq.report.stats_tables import learned_table, learning_line, stats_rows, stats_table

    text = CalibrationText(
        packed=not settings.pop("per_document"), **{name: settings.pop(name) for name in _TEXT}, seed=settings["seed"]
    )
    settings["layer_by_layer"] = settings["layer_by_layer"] or None
    settings["dtype"] = getattr(torch, settings["dtype"]) if settings["dtype"] else None
    speeds = dict.fromkeys(("Calibrating", "Learning codebooks"), text.samples * text.seq_len)
    with progress_bar(tokens=speeds, silent=not processes.is_first) as step:
        found = calibrate_folder(
            model, text, recipes, state_folder=state_folder_of(path), ranks=processes, progress=step, **settings
        )
    if found is None:
        return
    stats = found.stats
    save(stats, path)
    output.show(stats_table(stats_rows(stats)), *_notes(stats))
    transforms = [fit.facts for fit in stats.fits.values() if "objective" in fit.facts]
    learning = [asdict(entry) for entry in found.learning]
    if transforms:
        output.show(learned_table(transforms), *(learning_line(**entry) for entry in learning))
    tokens = stats.data.tokens if stats.data else 0
    output.show(f"Statistics of {text.samples} windows, {tokens:,} tokens, written to {path}.")
    output.write(
        {
            "stats": str(path),
            "layers": len(stats.layers),
            "tokens": tokens,
            "needs": sorted(stats.needs),
            "fits": {name: fit.facts for name, fit in stats.fits.items()},
            "learning": learning,
            "missing": dict(stats.missing),
            "processes": processes.world,
            "layer_by_layer": found.layer_by_layer,
            **stats.provenance(),
        }
    )


def _notes(stats) -> list[str]:
    """What could not be measured, a line for each reason."""
    reasons: dict[str, list[str]] = {}
    for need, why in sorted(stats.missing.items()):
        reasons.setdefault(why, []).append(need)
    return [f"Not measured: {', '.join(needs)}, because {why}" for why, needs in reasons.items()]
