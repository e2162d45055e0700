"""Write an export: the model's own weights, untouched, beside what kvq adds.

No weight is read into memory: shards are hard-linked where the file system can, else copied. The folder appears whole
or not at all (``kvq.export.atomic``), and the same inputs give the same bytes.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kvq.cache import CachePlan, make_plan
from kvq.calib.artefacts import fit_artefacts, needed_artefacts
from kvq.calib.stats import Stats
from kvq.errors import CheckpointError
from kvq.export.atomic import recover, whole_folder
from kvq.export.card import licence_of, model_card
from kvq.export.checkpoint import QUANT_METHOD, build_config, provenance_of, shard_index, side_files, to_json
from kvq.export.memory import memory_plan
from kvq.models.builtin import BUILTIN, MODEL_NAME
from kvq.models.describe import ModelSpec, describe
from kvq.models.resolve import INDEX_FILE, check_weights, load_config, resolve_model, weights_fingerprint
from kvq.recipe import Recipe, load_recipe

# Files of the base model that belong to it beside the weights. Everything else in a folder (other formats, code,
# training state) stays behind.
_COMPANIONS = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "tekken.json", "*.model", "*.tiktoken", "chat_template*", "additional_chat_templates/*", "*processor*.json",
    "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What an export wrote. ``path``: the folder; ``linked``/``copied``: weight files by how they came there."""

    path: str
    recipe: str
    recipe_hash: str
    model_fingerprint: str
    weights_fingerprint: str
    bits_per_element: float
    linked: int
    copied: int
    files: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def export(
    model: str | Path,
    recipe: Recipe | str | Path,
    out: str | Path,
    *,
    stats: Stats | str | Path | None = None,
    force: bool = False,
    base_name: str | None = None,
) -> ExportResult:
    """Write ``model`` with ``recipe`` to the new folder ``out``.

    model       ``builtin``, a folder or a hub id, as ``kvq.models.resolve.resolve_model`` takes it.
    stats       statistics or their file; needed by calibrated float8 only.
    force       replace an export that is already there; nothing else is ever replaced.
    base_name   name of the base model in card and provenance; by default the hub id or the folder's name.

    Raises CheckpointError for a target or source that cannot be used and if writing fails (nothing is left then),
    RecipeError, UnsupportedModelError or ModelNotFoundError as recipe, model and plan demand.
    """
    recipe = load_recipe(recipe)
    source, target = resolve_model(model).resolve(), Path(out).expanduser().resolve()
    config = _source_config(source)
    spec = describe(load_config(source))
    fingerprint = weights_fingerprint(source)
    artefacts, origin = _artefacts(stats, recipe, spec, fingerprint)
    plan = make_plan(recipe, spec, artefacts)
    provenance = provenance_of(
        plan, base_name=base_name or _base_name(model, source), weights_fingerprint=fingerprint, stats=origin
    )
    try:
        recover(target)
        _check_target(target, source, force)
        contents = _contents(source, config, plan, artefacts, provenance)
        with whole_folder(target, replace=force) as work:
            linked, copied = _place_weights(source, work)
            for name, content in contents.items():
                (work / name).parent.mkdir(exist_ok=True)
                (work / name).write_bytes(content)
            files = tuple(sorted(str(path.relative_to(work)) for path in work.rglob("*") if path.is_file()))
    except OSError as error:
        raise _write_error(error, out) from None
    return ExportResult(
        path=str(out),
        recipe=recipe.name,
        recipe_hash=recipe.hash,
        model_fingerprint=spec.fingerprint,
        weights_fingerprint=fingerprint,
        bits_per_element=plan.bits_per_element,
        linked=linked,
        copied=copied,
        files=files,
    )


def is_export(folder: Path) -> bool:
    """True if a folder's config.json says that kvq exported it."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
        return config["quantization_config"]["quant_method"] == QUANT_METHOD
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _source_config(source: Path) -> dict[str, Any]:
    """The source's config.json as plain data; refuses weights or caches that are quantized already."""
    try:
        config = json.loads((source / "config.json").read_bytes())
        nested = config.get("text_config") or {}
        quantized = config.get("quantization_config") or nested.get("quantization_config")
        method = quantized.get("quant_method") if quantized else None
    except (OSError, ValueError, AttributeError):
        raise CheckpointError(
            f"config.json of {source.name!r} cannot be read: copy or download the model again."
        ) from None
    if method == QUANT_METHOD:
        raise CheckpointError(f"model {source.name!r} is a kvq export already: export its base model instead.")
    if quantized:
        raise CheckpointError(
            f"model {source.name!r} has weights quantized by {method!r}, and an export has room for one quant_method: "
            "export the unquantized base model, or run this one with kvq.quantized_cache."
        )
    return config


def _check_target(target: Path, source: Path, force: bool) -> None:
    if target == source or source in target.parents or target in source.parents:
        raise CheckpointError(
            f"output folder {str(target)!r} is, holds or lies inside the model folder {str(source)!r}: choose another."
        )
    if not target.exists():
        return
    if not force:
        raise CheckpointError(f"output {str(target)!r} exists: choose another folder, or replace it with --force.")
    if not target.is_dir() or (any(target.iterdir()) and not is_export(target)):
        raise CheckpointError(
            f"output {str(target)!r} exists and is no kvq export, so --force does not replace it: choose another "
            "folder, or remove it yourself."
        )


def _artefacts(
    stats: Stats | str | Path | None, recipe: Recipe, spec: ModelSpec, fingerprint: str
) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """Artefacts and the identity of the statistics they come from; neither if the recipe needs none."""
    if stats is None:
        return {}, None
    loaded = stats if isinstance(stats, Stats) else Stats.load(stats)
    loaded.check_model(spec, fingerprint)
    if not needed_artefacts(recipe, spec):
        return {}, None
    if isinstance(stats, Stats):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "stats.safetensors"
            stats.save(file)
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
    else:
        digest = hashlib.sha256(Path(stats).read_bytes()).hexdigest()
    return fit_artefacts(recipe, spec, loaded), {**loaded.provenance(), "sha256": digest}


def _base_name(model: str | Path, source: Path) -> str:
    """A name for people: no path of a machine."""
    if model == BUILTIN:
        return MODEL_NAME
    text = str(model)
    is_hub_id = isinstance(model, str) and _HUB_ID.fullmatch(text) and not Path(text).exists()
    return text if is_hub_id else source.name


def _contents(
    source: Path,
    config: Mapping[str, Any],
    plan: CachePlan,
    artefacts: Mapping[str, torch.Tensor],
    provenance: dict[str, Any],
) -> dict[str, bytes]:
    """Every file of the export except the weights, by name."""
    contents = {}
    for pattern in _COMPANIONS:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                contents[str(file.relative_to(source))] = file.read_bytes()
    if "generation_config.json" in contents:
        contents["generation_config.json"] = _own_cache(contents["generation_config.json"])
    side = side_files(plan, artefacts, provenance)
    ours = build_config(plan, weights_fingerprint=provenance["weights_fingerprint"], files=side, copied=tuple(contents))
    plain = {key: value for key, value in config.items() if key != "cache_implementation"}
    contents["config.json"] = to_json({**plain, "quantization_config": ours})
    contents[INDEX_FILE] = shard_index(source)
    card = model_card(plan, memory_plan(plan.model, plan.recipe), provenance, licence_of(source))
    return contents | side | {"README.md": card.encode()}


def _own_cache(content: bytes) -> bytes:
    """Drop a cache_implementation: generate would build that cache instead of the packed one."""
    try:
        data = json.loads(content)
        if not {"cache_implementation", "cache_config"} & set(data):
            return content
    except (ValueError, TypeError):
        raise CheckpointError(
            "generation_config.json is not readable JSON: copy or download the model again."
        ) from None
    return to_json({k: v for k, v in data.items() if k not in ("cache_implementation", "cache_config")})


def _place_weights(source: Path, work: Path) -> tuple[int, int]:
    """Link or copy the shards; returns how many of each."""
    linked = copied = 0
    for file in check_weights(source):
        # The hub cache holds symbolic links, and a hard link to one of those would not outlive the cache.
        real = file.resolve()
        try:
            os.link(real, work / file.name)
            linked += 1
        except OSError:
            shutil.copyfile(real, work / file.name)
            copied += 1
    return linked, copied


def _write_error(error: OSError, out: str | Path) -> CheckpointError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CheckpointError(
            f"the disk is full, so {str(out)!r} was not written and nothing is left of it: free space, or choose "
            "another place (on the model's own disk the weights are linked and take none)."
        )
    return CheckpointError(
        f"{str(out)!r} cannot be written ({error.strerror or error}); nothing is left of it: choose another place."
    )
