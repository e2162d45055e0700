"""``kvq inspect``: what a model, a statistics file or an export is."""

import json
from pathlib import Path
from typing import Any

import click

from kvq.commands.common import Output, chosen_recipe, json_option, quiet_transformers, settings_option
from kvq.commands.diagnosis import Wishes, measured, show_diagnosis


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
    from kvq.exporting.folding import is_plain_export

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
        if is_export(path):
            _inspect_export(path, output)
        elif is_plain_export(path):
            _inspect_plain_export(path, output)
        else:
            _inspect_engine_export(path, output)
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
    facts = model_facts(spec)
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
        found = _statistics(folder, spec, name, stats)
        data |= show_diagnosis(found, f"Model {name}", stats_facts(found) | shown, wishes, output, folder)
    else:
        causes = causes_of_weights(spec, Weights(folder))
        data["causes"] = [vars(cause) for cause in causes]
        output.show(*(cause_line(vars(cause)) for cause in causes))
        output.show(f"For a verdict on recipes: kvq inspect {name} --measure")
    output.write(data)


def _statistics(folder: Path, spec, name: str, stats: str | None):
    """Statistics of the model: those given, which must be its own, or measured now."""
    from kvq.calib.check import check_stats
    from kvq.calib.stats import Stats

    if stats is None:
        return measured(folder, Path(name).name)
    found = Stats.load(stats)
    check_stats(found, spec, folder)
    return found


def model_facts(spec) -> dict[str, Any]:
    """A model's cache geometry as plain data."""
    return {
        "model_type": spec.model_type,
        "fingerprint": spec.fingerprint,
        "max_length": spec.max_length,
        "quantizable_layers": len(spec.full_layers),
        "fp16_bytes_per_token": sum(2 * 2 * layer.kv_heads * layer.head_dim for layer in spec.full_layers),
        "layers": [
            {
                "index": layer.index,
                "kind": layer.kind,
                "kv_heads": layer.kv_heads,
                "head_dim": layer.head_dim,
                "window": layer.window,
                "quantizable": layer.kind == "full",
            }
            for layer in spec.layers
        ],
    }


def _inspect_export(folder: Path, output: Output) -> None:
    from kvq.exporting.checkpoint import PROVENANCE, load_plan, read_side_files
    from kvq.exporting.folding import fold_lines
    from kvq.exporting.memory import memory_plan
    from kvq.models.resolve import check_weights, load_config
    from kvq.report.tables import facts_table, memory_table
    from kvq.transforms.fold_plan import FoldPlan

    config = load_config(folder)
    quantization = json.loads((folder / "config.json").read_bytes())["quantization_config"]
    plan = load_plan(folder, quantization, config)
    check_weights(folder)
    provenance = json.loads(read_side_files(folder, quantization)[PROVENANCE])
    memory = memory_plan(plan.model, plan.recipe).to_dict()
    transforms = list(fold_lines(plan, FoldPlan(folded=plan.folded)))
    facts = {
        "base model": provenance["base_model"],
        "recipe": f"{plan.recipe.name}: {plan.recipe.summary}",
        "recipe hash": plan.recipe.hash,
        "transforms": "\n".join(transforms) or "none",
        "weights fingerprint": provenance["weights_fingerprint"],
        "statistics": (provenance["statistics"] or {}).get("sha256", "none needed"),
        "written by": f"kvq {provenance['kvq_version']}",
        "side files": "unaltered (SHA-256 checked)",
    }
    output.show(facts_table(f"Export {folder.name}", facts), memory_table(memory))
    output.write(
        {
            "kind": "export",
            "recipe": plan.recipe.to_dict(),
            "transforms": transforms,
            "memory": memory,
            "provenance": provenance,
        }
    )


def _inspect_plain_export(folder: Path, output: Output) -> None:
    from kvq.exporting.checkpoint import PROVENANCE
    from kvq.exporting.folding import FOLDED
    from kvq.models.resolve import check_weights
    from kvq.report.tables import facts_table

    folded = json.loads((folder / "config.json").read_bytes())[FOLDED]
    provenance = json.loads((folder / PROVENANCE).read_bytes())
    check_weights(folder)
    chains = {side: ", ".join(step["kind"] for step in steps) for side, steps in folded["transforms"].items()}
    facts = {
        "target": provenance["target"],
        "base model": provenance["base_model"],
        "recipe": f"{folded['recipe']}, of which its transforms",
        **{f"{side}s": f"{chain} in the weights" for side, chain in chains.items()},
        "cache": "the engine's own",
        "statistics": (provenance["statistics"] or {}).get("sha256", "none needed"),
        "written by": f"kvq {provenance['kvq_version']}",
        "files": _listed(folder),
    }
    output.show(facts_table(f"Plain export {folder.name}", facts))
    output.write({"kind": "plain export", "folded": folded, "provenance": provenance})


def _inspect_engine_export(folder: Path, output: Output) -> None:
    from kvq.exporting.checkpoint import PROVENANCE
    from kvq.report.tables import facts_table

    provenance = json.loads((folder / PROVENANCE).read_bytes())
    recipe, scales = _served_cache(folder)
    facts = {
        "target": provenance["target"],
        "base model": provenance["base_model"],
        "recipe": f"{recipe.name}: {recipe.summary}",
        "cache": _cache_words(scales),
        **{f"{side} scales": f"{min(found):.4g} to {max(found):.4g}" for side, found in scales.items()},
        "statistics": (provenance["statistics"] or {}).get("sha256", "none needed"),
        "written by": f"kvq {provenance['kvq_version']}",
        "files": _listed(folder),
    }
    output.show(facts_table(f"Engine export {folder.name}", facts))
    output.write({"kind": "engine export", "recipe": recipe.to_dict(), "scales": scales, "provenance": provenance})


def _listed(folder: Path) -> str:
    from kvq.exporting.manifest import read_manifest

    manifest = read_manifest(folder)
    assert manifest is not None, "what makes a folder an export for engines"
    return f"{len(manifest['files'])} in the manifest; 'kvq check' compares them"


def _served_cache(folder: Path) -> tuple[Any, dict[str, list[float]]]:
    """The recipe of an engine export, and its scales by side; none if the engine computes them itself."""
    from kvq.codecs.float8 import Float8Codec
    from kvq.exporting.checkpoint import RECIPE
    from kvq.exporting.simulated_engine import is_engine_export, simulated_plan
    from kvq.recipe import load_recipe

    recipe = load_recipe(folder / RECIPE)
    if not is_engine_export(folder):
        return recipe, {}
    plan = simulated_plan(folder)
    groups = [group for groups in plan.layers.values() for group in groups]
    codecs = {side: [group.codecs[side] for group in groups] for side in ("key", "value")}
    return recipe, {side: [c.scale for c in own if isinstance(c, Float8Codec)] for side, own in codecs.items()}


def _cache_words(scales: dict[str, list[float]]) -> str:
    if not scales:
        return "the engine's own, transforms are in the weights"
    return f"FP8, {sum(map(len, scales.values()))} scales in the folder"
