"""What an export is: facts for people, and the same as plain data."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvq.codecs.float8 import Float8Codec
from kvq.exporting.checkpoint import PROVENANCE, RECIPE, load_plan, read_side_files
from kvq.exporting.exporter import is_export
from kvq.exporting.folding import FOLDED, fold_lines, is_plain_export
from kvq.exporting.manifest import read_manifest
from kvq.exporting.memory import memory_plan
from kvq.exporting.model_card import context_limit
from kvq.exporting.simulated_engine import is_engine_export, simulated_plan
from kvq.models.resolve import check_weights, load_config
from kvq.pages.layout import SIDES
from kvq.recipe import load_recipe
from kvq.transforms.fold_plan import FoldPlan


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """kind: ``export``, ``plain export`` or ``engine export``. facts: by name, for people; data: for machines."""

    kind: str
    facts: dict[str, str]
    data: dict[str, Any]


def inspect_export(folder: Path) -> Inspected:
    """Read an export of any target. Raises CheckpointError for what is missing or altered in it."""
    if is_export(folder):
        kind = "export"
        provenance, facts, data = _own_format(folder)
        last = {"side files": "unaltered (SHA-256 checked)"}
    else:
        provenance = json.loads((folder / PROVENANCE).read_bytes())
        plain = is_plain_export(folder)
        kind = "plain export" if plain else "engine export"
        cache, data = _plain(folder) if plain else _served(folder)
        facts = {"target": provenance["target"], "base model": provenance["base_model"], **cache}
        manifest = read_manifest(folder)
        assert manifest is not None, "what makes a folder an export for engines"
        last = {"files": f"{len(manifest['files'])} in the manifest; 'kvq check' compares them"}
    facts |= {
        "statistics": (provenance["statistics"] or {}).get("sha256", "none needed"),
        "written by": f"kvq {provenance['kvq_version']}",
        **last,
    }
    return Inspected(kind=kind, facts=facts, data={**data, "provenance": provenance})


def _own_format(folder: Path) -> tuple[dict[str, Any], dict[str, str], dict[str, Any]]:
    """Provenance, facts and data of an export in kvq's own format."""
    quantization = json.loads((folder / "config.json").read_bytes())["quantization_config"]
    plan = load_plan(folder, quantization, load_config(folder))
    check_weights(folder)
    provenance = json.loads(read_side_files(folder, quantization)[PROVENANCE])
    transforms = list(fold_lines(plan, FoldPlan(folded=plan.folded)))
    facts = {
        "base model": provenance["base_model"],
        "recipe": f"{plan.recipe.name}: {plan.recipe.summary}",
        "recipe hash": plan.recipe.hash,
        "transforms": "\n".join(transforms) or "none",
        "contexts": context_limit(plan.recipe, provenance) or "any",
        "weights fingerprint": provenance["weights_fingerprint"],
    }
    memory = memory_plan(plan.model, plan.recipe).to_dict()
    return provenance, facts, {"recipe": plan.recipe.to_dict(), "transforms": transforms, "memory": memory}


def _plain(folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
    folded = json.loads((folder / "config.json").read_bytes())[FOLDED]
    check_weights(folder)
    chains = {side: ", ".join(step["kind"] for step in steps) for side, steps in folded["transforms"].items()}
    facts = {
        "recipe": f"{folded['recipe']}, of which its transforms",
        **{f"{side}s": f"{chain} in the weights" for side, chain in chains.items()},
        "cache": "the engine's own",
    }
    return facts, {"folded": folded}


def _served(folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """An export for engines: its scales by side; none if the engine computes them itself."""
    recipe, scales = load_recipe(folder / RECIPE), {}
    if is_engine_export(folder):
        groups = [group for groups in simulated_plan(folder).layers.values() for group in groups]
        codecs = {side: [group.codecs[side] for group in groups] for side in SIDES}
        scales = {side: [c.scale for c in own if isinstance(c, Float8Codec)] for side, own in codecs.items()}
    words = f"FP8, {sum(map(len, scales.values()))} scales in the folder"
    facts = {
        "recipe": f"{recipe.name}: {recipe.summary}",
        "cache": words if scales else "the engine's own, transforms are in the weights",
        **{f"{side} scales": f"{min(found):.4g} to {max(found):.4g}" for side, found in scales.items()},
    }
    return facts, {"recipe": recipe.to_dict(), "scales": scales}
