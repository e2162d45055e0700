"""``kvq inspect``: what a model, a statistics file or an export is."""

import json
from pathlib import Path
from typing import Any

import click

from kvq.commands.common import Output, json_option, quiet_transformers


@click.command("inspect")
@click.argument("thing", metavar="MODEL|STATS|DIR")
@json_option
def command(thing: str, output: Output) -> None:
    """Say what a model, a statistics file or an export is, and what can be quantized.

    \b
    Examples:
      kvq inspect builtin
      kvq inspect stats.safetensors
      kvq inspect smollm2-kivi2 --json -
    """
    quiet_transformers()
    from kvq.export.exporter import is_engine_export, is_export
    from kvq.export.folding import is_plain_export

    if Path(thing).expanduser().is_file():
        _inspect_stats(Path(thing).expanduser(), output)
    elif is_export(Path(thing).expanduser()):
        _inspect_export(Path(thing).expanduser(), output)
    elif is_plain_export(Path(thing).expanduser()):
        _inspect_plain_export(Path(thing).expanduser(), output)
    elif is_engine_export(Path(thing).expanduser()):
        _inspect_engine_export(Path(thing).expanduser(), output)
    else:
        _inspect_model(thing, output)


def _inspect_stats(path: Path, output: Output) -> None:
    from kvq.calib.stats import Stats
    from kvq.report.stats_tables import stats_rows, stats_table
    from kvq.report.tables import facts_table

    stats = Stats.load(path)
    data = stats.data.to_dict() if stats.data else {}
    facts = {
        "model": stats.model,
        "weights": stats.weights_fingerprint[:12] or "unknown",
        "text": data.get("source", "the caller's own"),
        "tokens": f"{data['samples']} x {data['seq_len']}, seed {data['seed']}" if data else "unknown",
    } | {f"{package} version": text for package, text in stats.versions.items()}
    output.show(facts_table(f"Statistics {path.name}", facts), stats_table(stats_rows(stats)))
    output.write({"kind": "statistics"} | stats.provenance() | {"layers": stats_rows(stats)})


def _inspect_model(name: str, output: Output) -> None:
    from kvq.models.describe import describe
    from kvq.models.resolve import check_weights, load_config, resolve_model
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
    output.write({"kind": "model", "model": name, "weights_bytes": size} | facts)


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
    from kvq.export.checkpoint import PROVENANCE, load_plan, read_side_files
    from kvq.export.folding import fold_lines
    from kvq.export.memory import memory_plan
    from kvq.models.resolve import check_weights, load_config
    from kvq.report.tables import facts_table, memory_table
    from kvq.transforms.plan import FoldPlan

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
    from kvq.export.checkpoint import PROVENANCE
    from kvq.export.folding import FOLDED
    from kvq.export.manifest import read_manifest
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
        "files": f"{len(read_manifest(folder)['files'])} in the manifest; 'kvq check' compares them",
    }
    output.show(facts_table(f"Plain export {folder.name}", facts))
    output.write({"kind": "plain export", "folded": folded, "provenance": provenance})


def _inspect_engine_export(folder: Path, output: Output) -> None:
    from kvq.export.checkpoint import PROVENANCE
    from kvq.export.manifest import read_manifest
    from kvq.export.served import served_plan
    from kvq.report.tables import facts_table

    plan = served_plan(folder)
    provenance = json.loads((folder / PROVENANCE).read_bytes())
    scales = {
        side: [group.codecs[side].scale for groups in plan.layers.values() for group in groups]
        for side in ("key", "value")
    }
    facts = {
        "target": provenance["target"],
        "base model": provenance["base_model"],
        "recipe": f"{plan.recipe.name}: {plan.recipe.summary}",
        "scales": f"{2 * len(plan.layers)} in {len(plan.layers)} layers",
        **{f"{side} scales": f"{min(found):.4g} to {max(found):.4g}" for side, found in scales.items()},
        "statistics": (provenance["statistics"] or {}).get("sha256", "none needed"),
        "written by": f"kvq {provenance['kvq_version']}",
        "files": f"{len(read_manifest(folder)['files'])} in the manifest; 'kvq check' compares them",
    }
    output.show(facts_table(f"Engine export {folder.name}", facts))
    output.write({"kind": "engine export", "recipe": plan.recipe.to_dict(), "scales": scales, "provenance": provenance})
