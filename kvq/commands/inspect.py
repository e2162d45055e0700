"""``kvq inspect``: what a model, a statistics file or an export is."""

from pathlib import Path

import click

from kvq.commands.common import Output, chosen_recipe, json_option, progress_bar, quiet_transformers, settings_option
from kvq.commands.diagnosis import Wishes, show_diagnosis

# Of a short calibration, for a look at a model.
SAMPLES, SEQ_LEN = 8, 512


@click.command("inspect")
@click.argument("thing", metavar="MODEL|STATS|DIR")
@click.option("--measure", is_flag=True, help="Run MODEL over a little text, for a verdict from what it computes.")
@click.option("--stats", metavar="STATS", help="Statistics of MODEL, for a verdict from them.")
@click.option("--recipe", metavar="NAME|FILE", help="Also predict this recipe, and show its transforms in pictures.")
@settings_option
@click.option("--html", metavar="FILE", help="Write the verdict with pictures as one HTML file.")
@click.option("--png", metavar="FOLDER", help="Write the pictures into a folder.")
@json_option
def command(thing: str, measure: bool, stats: str | None, recipe, settings, html, png, output: Output) -> None:
    """Say what a model, a statistics file or an export is, and what quantization would do to it.

    Of statistics, and of a model with --measure or --stats: a verdict before anything is quantized, with the loss that
    recipes would cause, the error of each layer at each bit width, and what is to blame.

    \b
    Examples:
      kvq inspect builtin
      kvq inspect builtin --measure --html report.html
      kvq inspect stats.safetensors --recipe klt3 --png pictures
      kvq inspect smollm2-kivi2 --json -
    """
    wishes = Wishes(recipe=chosen_recipe(recipe, settings), html=html, png=png)
    wishes.check()
    quiet_transformers()
    from kvq.errors import CheckpointError
    from kvq.exporting.exporter import is_engine_export, is_export

    path = Path(thing).expanduser()
    if measure and stats:
        raise click.UsageError("--measure and --stats exclude each other: leave one of them out.")
    if path.is_file():
        if measure or stats:
            raise click.UsageError(f"{thing!r} is a file of statistics: leave --measure and --stats out.")
        _inspect_stats(path, wishes, output)
    elif is_export(path) or is_engine_export(path):
        if measure or stats or wishes:
            raise CheckpointError(f"{thing!r} is an export and quantized already: inspect its base model instead.")
        _inspect_export(path, output)
    else:
        _inspect_model(thing, measure or (bool(wishes) and not stats), stats, wishes, output)


def _inspect_stats(path: Path, wishes: Wishes, output: Output) -> None:
    from kvq.calib.stats import Stats
    from kvq.report.stats_tables import stats_rows, stats_table, token_rows, tokens_table
    from kvq.report.tables import facts_table

    stats = Stats.load(path)
    facts = stats_facts(stats)
    rows, tokens = stats_rows(stats), token_rows(stats)
    output.show(facts_table(f"Statistics {path.name}", facts), stats_table(rows))
    if tokens:
        output.show(tokens_table(tokens))
    found = show_diagnosis(stats, f"Statistics {path.name}", facts, wishes, output)
    output.write({"kind": "statistics"} | stats.provenance() | {"layers": rows, "tokens": tokens} | found)


def stats_facts(stats) -> dict[str, str]:
    data = stats.data.to_dict() if stats.data else {}
    return {
        "model": stats.model,
        "weights": stats.weights_fingerprint[:12] or "unknown",
        "text": data.get("source", "the caller's own"),
        "tokens": f"{data['samples']} x {data['seq_len']}, seed {data['seed']}" if data else "unknown",
    } | {f"{package} version": text for package, text in stats.versions.items()}


def _inspect_model(name: str, measure: bool, stats: str | None, wishes: Wishes, output: Output) -> None:
    from kvq.diagnosis.causes import causes_of_weights
    from kvq.models.describe import describe
    from kvq.models.resolve import check_weights, load_config, resolve_model
    from kvq.models.stored import Weights
    from kvq.report.diagnosis_tables import cause_line
    from kvq.report.tables import facts_table, layers_table

    folder = resolve_model(name)
    spec = describe(load_config(folder))
    files = check_weights(folder)
    facts = spec.to_dict()
    size = sum(file.stat().st_size for file in files)
    shown = {
        "type": facts["model_type"],
        "quantizable layers": f"{facts['quantizable_layers']} of {len(spec.layers)}",
        "longest context": f"{spec.max_length:,} tokens",
        "fp16 cache": f"{facts['fp16_bytes_per_token']:,} bytes per token",
        "weights": f"{size / 1e6:,.0f} MB in {len(files)} safetensors file{'s' if len(files) > 1 else ''}",
    }
    output.show(facts_table(f"Model {name}", shown), layers_table(facts["layers"]))
    data = {"kind": "model", "model": name, "weights_bytes": size} | facts
    if measure or stats:
        found = _measured(name) if stats is None else _given(stats, spec, folder)
        data |= show_diagnosis(found, f"Model {name}", stats_facts(found) | shown, wishes, output, folder)
    else:
        causes = causes_of_weights(spec, Weights(folder))
        data["causes"] = [vars(cause) for cause in causes]
        output.show(*(cause_line(vars(cause)) for cause in causes))
        output.show(f"For a verdict on recipes: kvq inspect {name} --measure")
    output.write(data)


def _measured(name: str):
    """Statistics of a short calibration on built-in text."""
    from kvq import api

    with progress_bar("Measuring") as step:
        return api.calibrate(
            name, samples=SAMPLES, seq_len=SEQ_LEN, batch_size=1, progress=lambda done, total, what: step(done, total)
        )


def _given(stats: str, spec, folder: Path):
    """Statistics of a file, which must be the model's own."""
    from kvq.calib.check import check_stats
    from kvq.calib.stats import Stats

    found = Stats.load(stats)
    check_stats(found, spec, folder)
    return found


def _inspect_export(folder: Path, output: Output) -> None:
    from kvq.exporting.inspection import inspect_export
    from kvq.report.tables import facts_table, memory_table

    found = inspect_export(folder)
    output.show(facts_table(f"{found.kind.capitalize()} {folder.name}", found.facts))
    if "memory" in found.data:
        output.show(memory_table(found.data["memory"]))
    output.write({"kind": found.kind, **found.data})
