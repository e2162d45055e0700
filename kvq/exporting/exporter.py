"""Write an export: the model's weights, beside what kvq adds for one target.

Weights are untouched, or have taken over the first transforms of the recipe (``kvq.transforms.fold_plan``). Untouched
files are hard-linked where the file system can, else copied; changed ones are streamed (``kvq.exporting.shards``),
while the logits are compared (``kvq.exporting.fold_check``). The folder appears whole or not at all
(``kvq.exporting.atomic_folder``), and the same inputs give the same bytes.
"""

import errno
import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kvq.cache import CachePlan, make_plan
from kvq.calib.artefacts import fit_artefacts, needed_artefacts
from kvq.calib.check import check_stats
from kvq.calib.stats import Stats
from kvq.errors import CheckpointError
from kvq.exporting.atomic_folder import recover, scratch_folder, whole_folder
from kvq.exporting.checkpoint import QUANT_METHOD, provenance_of, quantization_of, to_json
from kvq.exporting.engines import find_release
from kvq.exporting.fold_check import FoldCheck, check_folds
from kvq.exporting.folding import fold_lines, plan_of_folds, refuse_second_fold
from kvq.exporting.manifest import MANIFEST, Progress, build_manifest
from kvq.exporting.model_card import CARD, licence_of
from kvq.exporting.shards import placing_weights
from kvq.exporting.targets import TARGETS, Job, Target, find_target
from kvq.exporting.targets.repack import METHODS, repack
from kvq.exporting.targets.scheme import engine_view
from kvq.models.builtin import BUILTIN, MODEL_NAME
from kvq.models.describe import ModelSpec, describe
from kvq.models.resolve import INDEX_FILE, load_config, resolve_model, weights_fingerprint
from kvq.models.whole import check_whole
from kvq.recipe import Recipe, load_recipe
from kvq.transforms.fold_plan import FoldPlan

# Files of the base model that belong to it beside the weights. Everything else in a folder (other formats, code,
# training state) stays behind.
_COMPANIONS = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "tekken.json", "*.model", "*.tiktoken", "chat_template*", "additional_chat_templates/*", "*processor*.json",
    "LICENSE*", "NOTICE*", "USE_POLICY*", "hf_quant_config.json",
)  # fmt: skip
KVQ_TARGET = "kvq"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_NO_CHECK_YET = FoldCheck(error=0.0, kl=0.0, top1=1.0, noise_kl=0.0, tokens=0)


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What an export wrote.

    path                     the folder.
    linked, copied, folded   weight files by how they came there.
    folds                    what became of the transforms, one line for layers that are alike.
    check                    original and folded logits compared (``kvq.exporting.fold_check``); None without folds.
    """

    path: str
    target: str
    recipe: str
    recipe_hash: str
    model_fingerprint: str
    weights_fingerprint: str
    bits_per_element: float
    linked: int
    copied: int
    folded: int
    folds: tuple[str, ...]
    check: dict[str, Any] | None
    files: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def export(
    model: str | Path,
    recipe: Recipe | str | Path,
    out: str | Path,
    *,
    target: str = "kvq",
    stats: Stats | str | Path | None = None,
    other_weights: bool = False,
    force: bool = False,
    base_name: str | None = None,
    fold: bool = True,
    card: Callable[[str], str] | None = None,
    progress: Progress | None = None,
) -> ExportResult:
    """``kvq.export``, whose arguments and errors these are, but for two.

    card       makes the model card that is written of the one that would be, to add a section.
    progress   called with (bytes hashed, bytes in all) while a manifest is made.
    """
    recipe, to = load_recipe(recipe), find_target(target)
    source, folder = resolve_model(model).resolve(), Path(out).expanduser().resolve()
    config = _source_config(source, to)
    _refuse_foreign_links(source)
    model_config = load_config(source)
    spec = describe(model_config)
    fingerprint = weights_fingerprint(source)
    loaded = stats if stats is None or isinstance(stats, Stats) else Stats.load(stats)
    if loaded is not None:
        check_stats(loaded, spec, source, other_weights=other_weights)
    view = _view(to, spec, loaded)
    artefacts, origin = _artefacts(loaded, stats, recipe, view, source)
    plan = make_plan(recipe, view, artefacts)
    folds = _folds(plan, source, config) if fold else FoldPlan()
    refuse_second_fold(config, folds)
    plan = make_plan(recipe, view, artefacts, folds.folded)
    provenance = provenance_of(
        plan, base_name=base_name or _base_name(model, source), weights_fingerprint=fingerprint, stats=origin
    ) | {"model_fingerprint": spec.fingerprint}
    try:
        recover(folder)
        _check_target(folder, source, force)
        with ExitStack() as stack:
            placed, config = _in_layout(source, config, to, folder, stack)
            job = Job(
                source=placed,
                config=config,
                model=spec,
                plan=plan,
                artefacts=artefacts,
                companions=_companions(source),
                provenance=provenance | ({} if placed == source else {"repacked_from": _method(source)}),
                licence=licence_of(source),
                folder=folder.name,
                weights=fingerprint,
                folds=folds,
                check=None,
            )
            check = partial(check_whole, source, model_config)
            job, counts, files = _write(job, to, folder, check, force, card, progress)
            if placed != source:
                counts = {**counts, "linked": 0, "copied": counts["linked"] + counts["copied"]}
    except OSError as error:
        raise _write_error(error, out) from None
    return ExportResult(
        path=str(out),
        target=to.name,
        recipe=recipe.name,
        recipe_hash=recipe.hash,
        model_fingerprint=spec.fingerprint,
        weights_fingerprint=job.weights,
        bits_per_element=plan.bits_per_element,
        **counts,
        folds=tuple(fold_lines(plan, folds)),
        check=job.check.to_dict() if job.check else None,
        files=files,
    )


def _write(
    job: Job,
    to: Target,
    folder: Path,
    check: Callable[[], None],
    force: bool,
    card: Callable[[str], str] | None,
    progress: Progress | None,
) -> tuple[Job, dict[str, int], tuple[str, ...]]:
    """Write the folder; returns the job with the fingerprint of what was written, how weights came, and all files.

    ``check`` refuses a checkpoint that does not hold what its config says.
    """
    folds = job.folds.operations
    with whole_folder(folder, replace=force) as work:
        with placing_weights(to.weights(job.source), work, folds) as placed:
            # While files are copied: what refuses the checkpoint, or what the target cannot express. Cards read the
            # check of folds, which comes last, so one is made up.
            check()
            contents = {**job.companions, **to.contents(to, replace(job, check=_NO_CHECK_YET) if folds else job)}
            if folds:
                job = replace(job, check=check_folds(job.source, folds, job.model.dtype, placed.put))
        if folds:
            # Only now are the weights and the check known that config and card name.
            job = replace(job, weights=weights_fingerprint(work))
            contents = {**job.companions, **to.contents(to, job)}
        if card is not None:
            contents[CARD] = card(contents[CARD].decode()).encode()
        for name, content in contents.items():
            (work / name).parent.mkdir(exist_ok=True)
            (work / name).write_bytes(content)
        known = {} if folds else _known_hashes(to.weights(job.source))
        (work / MANIFEST).parent.mkdir(exist_ok=True)
        (work / MANIFEST).write_bytes(build_manifest(work, to.name, known, progress, limit=to.hash_limit))
        files = tuple(sorted(str(path.relative_to(work)) for path in work.rglob("*") if path.is_file()))
    return job, placed.counts, files


def _in_layout(
    source: Path, config: dict[str, Any], to: Target, folder: Path, stack: ExitStack
) -> tuple[Path, dict[str, Any]]:
    """The folder whose weights are written, and its config: a repacked copy where the target cannot take the layout."""
    method = _method(source)
    if method not in METHODS or to.formats.get(method) == method:
        return source, config
    work = stack.enter_context(scratch_folder(folder))
    return work, repack(source, work, config)


def _method(source: Path) -> str | None:
    """The quant_method of a folder's weights."""
    return (quantization_of(json.loads((source / "config.json").read_bytes())) or {}).get("quant_method")


def is_export(folder: Path) -> bool:
    """True if a folder's config.json says that kvq exported it."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
        return config["quantization_config"]["quant_method"] == QUANT_METHOD
    except (OSError, ValueError, KeyError, TypeError):
        return False


def is_engine_export(folder: Path) -> bool:
    """True if kvq exported a folder for serving engines."""
    return (folder / MANIFEST).is_file() and not is_export(folder)


def _source_config(source: Path, target: Target) -> dict[str, Any]:
    """The source's config.json as plain data; refuses caches, and weights, that the target cannot take as they are."""
    try:
        config = json.loads((source / "config.json").read_bytes())
        quantized = quantization_of(config)
        method = quantized.get("quant_method") if quantized else None
    except (OSError, ValueError, AttributeError):
        raise CheckpointError(
            f"config.json of {source.name!r} cannot be read: copy or download the model again."
        ) from None
    if method == QUANT_METHOD:
        raise CheckpointError(f"model {source.name!r} is a kvq export already: export its base model instead.")
    if quantized and method not in target.formats:
        raise CheckpointError(_refused_weights(source, method, target))
    # A cache_implementation there would make generate build another cache than the one that is exported.
    return {key: value for key, value in config.items() if key != "cache_implementation"}


def _folds(plan: CachePlan, source: Path, config: Mapping[str, Any]) -> FoldPlan:
    """What the weights can take over: nothing if they are quantized, since they would be rounded again."""
    if not quantization_of(config):
        return plan_of_folds(plan, source)
    reason = "quantized weights would be rounded again"
    return FoldPlan(left={i: {s: reason for s in own if plan.transforms_of(i, s)} for i, own in plan.chains.items()})


def _refused_weights(source: Path, method: str, target: Target) -> str:
    takes = [name for name, other in TARGETS.items() if method in other.formats]
    if target.name == KVQ_TARGET:
        way = f"use --target {takes[0]}" if takes else "run it with kvq.quantized_cache"
        return (
            f"model {source.name!r} has weights quantized by {method!r}, and an export has room for one quant_method: "
            f"export the unquantized base model, or {way}."
        )
    if not target.formats:
        return (
            f"model {source.name!r} has weights quantized by {method!r}, and transforms fold into unquantized weights "
            "only: export the base model and quantize its weights afterwards."
        )
    release = find_release(target.engines[0])
    why = release.refused.get(method, f"the target {target.name!r} stores KV scales in another format")
    way = f"use --target {takes[0]}" if takes else "quantize the weights to compressed-tensors instead"
    return f"model {source.name!r} has weights quantized by {method!r}: {release.title}: {why}; {way}."


def _check_target(target: Path, source: Path, force: bool) -> None:
    if target == source or source in target.parents or target in source.parents:
        raise CheckpointError(
            f"output folder {str(target)!r} is, holds or lies inside the model folder {str(source)!r}: choose another."
        )
    if not target.exists():
        return
    if not force:
        raise CheckpointError(f"output {str(target)!r} exists: choose another folder, or replace it with --force.")
    ours = target.is_dir() and (is_export(target) or is_engine_export(target))
    if not target.is_dir() or (any(target.iterdir()) and not ours):
        raise CheckpointError(
            f"output {str(target)!r} exists and is no kvq export, so --force does not replace it: choose another "
            "folder, or remove it yourself."
        )


def _view(target: Target, spec: ModelSpec, stats: Stats | None) -> ModelSpec:
    """The model as the target sees it: with its sliding-window layers if those are quantized and were measured."""
    view = engine_view(spec) if target.sliding else spec
    measured = stats is None or all(layer.index in stats.layers for layer in view.full_layers)
    return view if measured else spec


def _artefacts(
    loaded: Stats | None, stats: Stats | str | Path | None, recipe: Recipe, spec: ModelSpec, source: Path
) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """Artefacts and the identity of the statistics they come from; neither if the recipe needs none."""
    if loaded is None or not needed_artefacts(recipe, spec):
        return {}, None
    if isinstance(stats, Stats):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "stats.safetensors"
            stats.save(file)
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
    else:
        digest = hashlib.sha256(Path(stats).read_bytes()).hexdigest()
    return fit_artefacts(recipe, spec, loaded, source), {**loaded.provenance(), "sha256": digest}


def _base_name(model: str | Path, source: Path) -> str:
    """A name for people: no path of a machine."""
    if model == BUILTIN:
        return MODEL_NAME
    text = str(model)
    is_hub_id = isinstance(model, str) and _HUB_ID.fullmatch(text) and not Path(text).exists()
    return text if is_hub_id else source.name


def _refuse_foreign_links(source: Path) -> None:
    """A link is followed within its folder, and from a snapshot of the hub's cache to its blobs. Raises CheckpointError
    for others: an export is uploaded, and must hold nothing that its maker did not put into the model's folder."""
    homes = [source, source.parent.parent / "blobs"] if source.parent.name == "snapshots" else [source]
    for pattern in ("config.json", "*.safetensors", INDEX_FILE, *_COMPANIONS):
        for file in source.glob(pattern):
            target = file.resolve()
            if not any(target.is_relative_to(home) for home in homes):
                raise CheckpointError(
                    f"{str(file.relative_to(source))!r} of model {source.name!r} leads out of its folder, to {target}: "
                    "put the file itself there, so that an export takes no other file along."
                )


def _companions(source: Path) -> dict[str, bytes]:
    """Files of the base model that belong to an export beside the weights, by name."""
    found = {}
    for pattern in _COMPANIONS:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                found[str(file.relative_to(source))] = file.read_bytes()
    if "generation_config.json" in found:
        found["generation_config.json"] = _own_cache(found["generation_config.json"])
    return found


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


def _known_hashes(files: Mapping[str, Path]) -> dict[str, str]:
    """SHA-256 of shards that come from the hub cache, which names its files by it."""
    real = {name: file.resolve() for name, file in files.items()}
    return {n: p.name for n, p in real.items() if p.parent.name == "blobs" and _SHA256.fullmatch(p.name)}


def _write_error(error: OSError, out: str | Path) -> CheckpointError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CheckpointError(
            f"the disk is full, so {str(out)!r} was not written and nothing is left of it: free space, or choose "
            "another place (on the model's own disk the weights are linked and take none)."
        )
    return CheckpointError(
        f"{str(out)!r} cannot be written ({error.strerror or error}); nothing is left of it: choose another place."
    )
