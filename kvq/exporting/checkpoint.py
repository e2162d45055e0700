"""The on-disk contract of an export: what is written beside the weights, and how it is read back.

    DIR/config.json                     the model's own, with ``quantization_config`` (FIELDS below)
    DIR/*.safetensors, index            the model's own weights, unchanged or with transforms folded in (``folded``)
    DIR/recipe.yaml                     the recipe, for people
    DIR/kvq/artefacts.safetensors       tensors that the recipe needs (``kvq.calib.artefacts``)
    DIR/kvq/provenance.json             where all this came from
    DIR/kvq/manifest.json               size and hash of every file, for ``kvq check`` (``kvq.exporting.manifest``)

``quantization_config`` is complete: codecs, hashes of the side files, and the identity of model and weights. The side
files lie in a sub-folder because serving engines read every ``*.safetensors`` of the root as weights. Nothing written
depends on the clock, on the machine, or on the release of transformers.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from transformers import PretrainedConfig

from kvq import __version__
from kvq.cache import CachePlan, make_plan
from kvq.calib.artefacts import check_artefacts, needed_artefacts
from kvq.codecs import Artefact
from kvq.errors import CheckpointError
from kvq.models.describe import ModelSpec, describe
from kvq.models.resolve import INDEX_FILE, check_weights
from kvq.models.stored import tensors_of
from kvq.recipe import Recipe, parse_recipe

SCHEMA_VERSION = 1
QUANT_METHOD = "kvq"
ARTEFACTS = "kvq/artefacts.safetensors"
PROVENANCE = "kvq/provenance.json"
RECIPE = "recipe.yaml"
SIDE_FILES = (ARTEFACTS, PROVENANCE, RECIPE)

# Fields of ``quantization_config`` and their JSON types.
FIELDS = {
    "quant_method": str,
    "schema_version": int,
    "kvq_version": str,
    "recipe": dict,
    "recipe_hash": str,
    "model_fingerprint": str,
    "weights_fingerprint": str,
    "files": dict,
    "copied": list,
}
# Only where there is something to say: by layer and side, how many transforms the weights have taken over.
OPTIONAL_FIELDS = {"folded": dict}
_SHA256 = re.compile(r"[0-9a-f]{64}")
_EXPORT_AGAIN = "copy the whole folder again, or repeat 'kvq export'"


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The ``quantization_config`` of a config.json, wherever it sits; None if there is none."""
    nested = config.get("text_config")
    inner = nested.get("quantization_config") if isinstance(nested, Mapping) else None
    return config.get("quantization_config") or inner


def side_files(
    plan: CachePlan, artefacts: Mapping[str, torch.Tensor], provenance: Mapping[str, Any]
) -> dict[str, bytes]:
    """The contents of the side files by name; only the artefacts that the recipe reads are kept."""
    tensors = {name: artefacts[name].clone().contiguous() for name in needed_artefacts(plan.recipe, plan.model)}
    return {
        ARTEFACTS: save(tensors, metadata={"format": "pt"}),
        PROVENANCE: to_json(dict(sorted(provenance.items()))),
        RECIPE: plan.recipe.to_yaml().encode(),
    }


def provenance_of(
    plan: CachePlan, *, base_name: str, weights_fingerprint: str, stats: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Where an export comes from, as plain data.

    An export is a function of the model's files, recipe, statistics and kvq release, and two releases of transformers
    must write the same bytes. So it records the releases that kvq requires, and those that measured the statistics.
    """
    try:
        required = [line for line in requires("kvq-toolkit") or () if line.startswith(("torch", "transformers"))]
    except PackageNotFoundError:
        required = []
    return {
        "base_model": base_name,
        "kvq_version": __version__,
        "model_fingerprint": plan.model.fingerprint,
        "recipe": plan.recipe.name,
        "recipe_hash": plan.recipe.hash,
        "requires": sorted(required),
        "statistics": stats,
        "weights_fingerprint": weights_fingerprint,
    }


def build_config(
    plan: CachePlan, *, weights_fingerprint: str, files: Mapping[str, bytes], copied: Iterable[str]
) -> dict[str, Any]:
    """The ``quantization_config`` of an export, as plain JSON data.

    files    side files by name, as ``side_files`` returns them.
    copied   names of the tokenizer, generation and processor files that belong to the export.
    """
    return {
        "quant_method": QUANT_METHOD,
        "schema_version": SCHEMA_VERSION,
        "kvq_version": __version__,
        "recipe": _recipe_to_json(plan.recipe),
        "recipe_hash": plan.recipe.hash,
        "model_fingerprint": plan.model.fingerprint,
        "weights_fingerprint": weights_fingerprint,
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        "copied": sorted(copied),
        **_folded_field(plan),
    }


def _folded_field(plan: CachePlan) -> dict[str, Any]:
    folded = {str(index): dict(sides) for index, sides in sorted(plan.folded.items())}
    return {"folded": folded} if folded else {}


def check_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Check a ``quantization_config`` field by field and return it as a plain dict.

    Raises CheckpointError for another or a newer format, unknown or missing fields, and values out of bounds.
    """
    writer = config.get("kvq_version", "unknown")
    version = config.get("schema_version")
    if config.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(
            f"quant_method {config.get('quant_method')!r} is not {QUANT_METHOD!r}: load this model with the tool that "
            "quantized it."
        )
    if type(version) is not int or not 1 <= version <= SCHEMA_VERSION:
        raise CheckpointError(
            f"this export has schema_version {version!r}, written by kvq {writer}, and kvq {__version__} reads 1 to "
            f"{SCHEMA_VERSION}: install the kvq that wrote it, or export again."
        )
    for name in config:
        if name not in FIELDS | OPTIONAL_FIELDS:
            raise CheckpointError(
                f"quantization_config has the unknown field {name!r}, written by kvq {writer} (this is {__version__}): "
                "install the kvq that wrote it, or export again."
            )
    for name, kind in (FIELDS | {k: v for k, v in OPTIONAL_FIELDS.items() if k in config}).items():
        if type(config.get(name)) is not kind:
            what = "lacks" if name not in config else f"has {config[name]!r} as"
            raise CheckpointError(f"quantization_config {what} {name!r}, a {kind.__name__}: {_EXPORT_AGAIN}.")
    _check_files(config)
    return dict(config)


def _check_files(config: Mapping[str, Any]) -> None:
    files, copied = config["files"], config["copied"]
    if set(files) != set(SIDE_FILES):
        raise CheckpointError(
            f"quantization_config lists the side files {sorted(files)}, and they must be {sorted(SIDE_FILES)}: "
            f"{_EXPORT_AGAIN}."
        )
    for name, digest in files.items():
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise CheckpointError(f"quantization_config has {digest!r} as SHA-256 of {name!r}: {_EXPORT_AGAIN}.")
    for name in copied:
        # Untrusted text: it must not lead out of the folder.
        if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"quantization_config lists {name!r}, which is no file of this folder.")


def read_side_files(folder: Path, config: Mapping[str, Any]) -> dict[str, bytes]:
    """Read the side files by name. Raises CheckpointError for one that is missing or whose hash differs."""
    contents = {}
    for name, digest in config["files"].items():
        try:
            contents[name] = (Path(folder) / name).read_bytes()
        except OSError:
            raise CheckpointError(
                f"{str(folder)!r} lacks {name!r}, which its quantization_config promises: {_EXPORT_AGAIN}."
            ) from None
        if hashlib.sha256(contents[name]).hexdigest() != digest:
            hint = " (a recipe is changed by exporting again, not in place)" if name == RECIPE else ""
            raise CheckpointError(
                f"{name!r} in {str(folder)!r} is not the file that was exported, its hash differs{hint}: "
                f"{_EXPORT_AGAIN}."
            )
    return contents


def load_plan(folder: str | Path, quantization_config: Mapping[str, Any], model_config: PretrainedConfig) -> CachePlan:
    """Read an export's side files and resolve its recipe against the model.

    Raises CheckpointError for anything missing, altered, of a newer format or of another model, RecipeError for a
    recipe that cannot work.
    """
    config = check_config(quantization_config)
    files = read_side_files(Path(folder), config)
    return plan_of(config, files, _own_spec(config, Path(folder), model_config))


def plan_of(config: Mapping[str, Any], files: Mapping[str, bytes], spec: ModelSpec) -> CachePlan:
    """The cache plan of a checked config and its side files for a described model; raises as ``load_plan`` does."""
    recipe = _recipe_from_json(config["recipe"])
    if recipe.hash != config["recipe_hash"]:
        raise CheckpointError(
            f"recipe {recipe.name!r} in quantization_config does not have the hash that was exported: {_EXPORT_AGAIN}."
        )
    if spec.fingerprint != config["model_fingerprint"]:
        raise CheckpointError(
            f"this export was made for a model of another shape than this {spec.model_type!r}: take the config.json "
            "that was exported with it, or export this model."
        )
    artefacts = _read_artefacts(files[ARTEFACTS], needed_artefacts(recipe, spec))
    return make_plan(recipe, spec, artefacts, _folded(config.get("folded", {}), recipe, spec))


def _folded(data: Mapping[str, Any], recipe: Recipe, spec: ModelSpec) -> dict[int, dict[str, int]]:
    """Steps that the weights have taken over, by layer and side, checked against the recipe."""
    found = {}
    for index, sides in data.items():
        steps = {"key": 0, "value": 0}
        if index.isdigit() and int(index) < len(spec.layers):
            transforms = recipe.for_head(int(index), 0, len(spec.layers)).transforms
            steps = {side: len(getattr(transforms, side)) for side in steps}
        counts = sides if isinstance(sides, dict) else {}
        if not counts or any(type(n) is not int or not 1 <= n <= steps.get(side, 0) for side, n in counts.items()):
            raise CheckpointError(
                f"quantization_config says that layer {index!r} has folded {sides!r}, which its recipe does not have: "
                f"{_EXPORT_AGAIN}."
            )
        found[int(index)] = dict(counts)
    return found


def _own_spec(config: Mapping[str, Any], folder: Path, model_config: PretrainedConfig) -> ModelSpec:
    """Describe the model; the text part of a vision-language export is described under the export's model type."""
    spec = describe(model_config)
    if spec.fingerprint != config["model_fingerprint"]:
        try:
            whole = json.loads((folder / "config.json").read_bytes())
            renamed = replace(spec, model_type=whole["model_type"]) if "text_config" in whole else spec
        except (OSError, ValueError, KeyError, TypeError):
            return spec
        return renamed if renamed.fingerprint == config["model_fingerprint"] else spec
    return spec


def _read_artefacts(content: bytes, needed: Mapping[str, Artefact]) -> dict[str, torch.Tensor]:
    try:
        tensors = load(content)
    except (SafetensorError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{ARTEFACTS!r} is not a safetensors file: {_EXPORT_AGAIN}.") from None
    wrong = check_artefacts(tensors, needed)
    if wrong:
        raise CheckpointError(f"{ARTEFACTS!r} {wrong}: calibrate and export again.")
    return tensors


def shard_index(folder: Path) -> bytes:
    """The shard index of a folder: its own if it has several shards, else one made from the headers.

    An index is written for a single shard too: with one, serving engines ignore every other safetensors file.
    """
    files = check_weights(folder)
    if len(files) > 1 and (folder / INDEX_FILE).is_file():
        return (folder / INDEX_FILE).read_bytes()
    tensors = tensors_of(folder)
    total = sum(tensor.nbytes for tensor in tensors.values())
    return to_json(
        {"metadata": {"total_size": total}, "weight_map": {n: tensors[n].file.name for n in sorted(tensors)}}
    )


def to_json(data: Any) -> bytes:
    """JSON text as every file of an export is written: order kept, two spaces, a newline at the end."""
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


def _recipe_to_json(recipe: Recipe) -> dict[str, Any]:
    data = recipe.to_dict()
    if "layers" in data:
        # Later patterns win, and transformers sorts the keys of config.json when it saves: a list keeps their order.
        data["layers"] = [[pattern, override] for pattern, override in data["layers"].items()]
    return data


def _recipe_from_json(data: Mapping[str, Any]) -> Recipe:
    layers = data.get("layers", [])
    pairs = isinstance(layers, list) and all(isinstance(p, list) and len(p) == 2 for p in layers)
    if not pairs or not all(isinstance(pattern, str) for pattern, _ in layers):
        raise CheckpointError(
            f"quantization_config.recipe has {layers!r} as layers, not a list of pairs: {_EXPORT_AGAIN}."
        )
    return parse_recipe({**data, "layers": dict(layers)}, source="quantization_config")
