"""The rules of one engine, applied to one folder."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvq.errors import CheckpointError, KvqError, RecipeError
from kvq.exporting.check.findings import Finding, Report, ScaleSummary, error, note, warning
from kvq.exporting.check.folder import Folder, read_folder
from kvq.exporting.check.kv_scales import Scales, judge_values, read_scales
from kvq.exporting.check.recipe_support import recipes_in
from kvq.exporting.checkpoint import QUANT_METHOD, RECIPE
from kvq.exporting.engines import Reader, Release
from kvq.exporting.manifest import Progress
from kvq.exporting.targets import TARGETS
from kvq.exporting.targets.formats import has_kv_scheme, has_packed_zeros
from kvq.exporting.targets.native_dtypes import takes
from kvq.models.describe import ModelSpec, describe
from kvq.models.resolve import load_config
from kvq.recipe import Recipe, load_recipe


@dataclass(frozen=True, kw_only=True)
class _Cache:
    """What an engine's cache holds; flag, skipped: what the serve command says; scaled: its scales are the folder's."""

    dtype: str = "16 bits, as the model"
    flag: str | None = None
    skipped: tuple[str, ...] = ()
    scaled: bool = False


def check_folder(
    path: str | Path, releases: Iterable[Release], *, quick: bool = False, progress: Progress | None = None
) -> list[Report]:
    """Check a folder for every release, from its files alone.

    quick      compare large files by size instead of by hash.
    progress   called with (bytes hashed, bytes in all).

    Raises CheckpointError if there is no such folder; everything else that is wrong is a finding.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"folder {str(path)!r} does not exist: give the folder that 'kvq export' wrote.")
    folder, findings = read_folder(path, quick=quick, progress=progress)
    model = _describe(folder, findings)
    scales = None
    if model is not None and folder.quantization.get("quant_method") != QUANT_METHOD:
        scales = read_scales(folder, model, findings)
        findings += judge_values(scales, model, measured=folder.written_by is not None)
    return [_judge(folder, model, scales, list(findings), release) for release in releases]


def settled(reports: Sequence[Report]) -> Sequence[Report]:
    """The reports as they are told: what an engine refuses in which a folder need not load is a note."""
    if not passes(reports):
        return reports
    notes = [[replace(f, level="note") if f.level == "error" else f for f in report.findings] for report in reports]
    return [replace(report, findings=tuple(found)) for report, found in zip(reports, notes)]


def passes(reports: Sequence[Report]) -> bool:
    """True if the engine that the folder was written for loads it; for a stranger's folder, if any does."""
    return any(not report.errors for report in _deciding(reports))


def verdict(folder: str, reports: Sequence[Report]) -> str:
    """Why a folder does not pass, in a sentence."""
    report = _deciding(reports)[0]
    first, others = report.errors[0], len(report.errors) - 1
    more = f" ({others} more in the table)" if others else ""
    return f"{folder!r} fails for {report.engine} {report.version}: {first.about!r}: {first.text.rstrip('.')}{more}."


def _deciding(reports: Sequence[Report]) -> Sequence[Report]:
    target = TARGETS.get(reports[0].written_by)
    return [report for report in reports if target and report.engine == target.engines[0]] or reports


def _describe(folder: Folder, findings: list[Finding]) -> ModelSpec | None:
    try:
        return describe(load_config(folder.path))
    except KvqError as wrong:
        findings.append(error("config.json", str(wrong)))
        return None


def _judge(
    folder: Folder, model: ModelSpec | None, scales: Scales | None, findings: list[Finding], release: Release
) -> Report:
    """One engine's report; ``findings`` are those of the folder, and are added to."""
    if release.single_file_first and folder.hides_files:
        text = f"hides the other files, because {release.title} reads a file of this name alone: rename it."
        findings.append(error("model.safetensors", text))
    cache = _cache(folder, model, scales, findings, release)
    if cache.skipped and not release.skip_flag:
        text = f"layers {', '.join(cache.skipped)} have no scales, and {release.title} has one cache dtype for all."
        findings.append(error("scales", text))
    failed = any(finding.level == "error" for finding in findings)
    summary = scales.summary(_unscaled(model, scales, cache)) if scales is not None else ScaleSummary()
    return Report(
        folder=folder.path.name,
        engine=release.engine,
        version=release.version,
        written_by=folder.written_by,
        cache_dtype=None if failed else cache.dtype,
        serve=None if failed else release.command(str(folder.path), cache.flag, cache.skipped),
        flag=cache.flag,
        skip=cache.skipped,
        scales=summary,
        findings=tuple(findings),
        recipes=recipes_in(release, model) if model else {},
    )


def _cache(
    folder: Folder, model: ModelSpec | None, scales: Scales | None, findings: list[Finding], release: Release
) -> _Cache:
    """The cache that an engine makes for a folder; adds to ``findings`` what is wrong with it."""
    method = folder.quantization.get("quant_method")
    reader = release.readers.get(method)
    if method is not None and reader is None:
        findings.append(_refused(folder, release, method, scales))
        return _Cache()
    if reader is None:
        flag = _own_flag(folder, release)
        findings += _unused(scales)
        if flag and release.own[flag].where:
            findings.append(warning("serving", f"{flag} runs {release.own[flag].where}."))
        return _Cache(dtype=flag or _Cache.dtype, flag=flag)
    findings += _config_findings(folder, release, reader, scales)
    if scales is None:
        return _Cache(dtype=reader.dtype or reader.flag, flag=reader.flag)
    if not _has_kv_scheme(folder, scales):
        findings += _unused(scales)
        return _Cache()
    skipped = _skipped(folder, model, scales)
    findings += _scale_findings(folder, model, release, reader, scales, skipped)
    return _Cache(dtype=reader.dtype or reader.flag, flag=reader.flag, skipped=skipped, scaled=True)


def _unscaled(model: ModelSpec, scales: Scales, cache: _Cache) -> set[int]:
    """Layers for which no scales are expected."""
    if cache.scaled or scales.found:
        return {layer.index for layer in model.layers if _is_skipped(layer, cache.skipped)}
    return set(scales.layers)


def _refused(folder: Folder, release: Release, method: str, scales: Scales | None) -> Finding:
    """A quant_method without KV scales: an error if the folder holds some, or if the engine does not load it at all."""
    why = release.refused.get(method)
    if why is None:
        kind = error if scales and scales.found else warning
        return kind("config.json", f"{release.name} is not known to read KV scales with quant_method {method!r}.")
    harmless = method in ("gptq", "awq") and not (scales and scales.found)
    return (note if harmless else error)("config.json", f"{release.name}: {why}.")


def _config_findings(folder: Folder, release: Release, reader: Reader, scales: Scales | None) -> list[Finding]:
    """Fields that the engine needs, and a KV scheme that it supports."""
    if not _has_kv_scheme(folder, scales) and folder.quantization.get("quant_method") != QUANT_METHOD:
        return []
    inner = folder.quantization.get("quantization")
    found = []
    for field in reader.needs:
        where = [folder.quantization, inner if isinstance(inner, dict) else {}]
        if not any(field in part for part in where):
            found.append(error("config.json", f"quantization_config lacks {field!r}, which {release.name} needs."))
    for field in reader.filled:
        if not folder.quantization.get(field):
            text = f"quantization_config has an empty {field!r}, and {release.name} fails on it; take another release."
            found.append(error("config.json", text))
    if has_packed_zeros(folder.quantization) and not reader.zeros:
        text = f"says that packed weights have zero points, which {release.name} does not load."
        found.append(error("config.json", text))
    scheme = folder.quantization.get("kv_cache_scheme")
    if isinstance(scheme, dict):
        found += [error("config.json", text) for text in _scheme_problems(scheme, release, reader)]
    return found


def _scheme_problems(scheme: dict[str, Any], release: Release, reader: Reader) -> list[str]:
    stored = f"{scheme.get('num_bits')}-bit {scheme.get('type')}"
    problems = []
    if (scheme.get("num_bits"), scheme.get("type")) != (8, "float"):
        problems.append(f"kv_cache_scheme is {stored}, and {release.name} takes 8-bit float only.")
    if scheme.get("dynamic", False) is not False:
        problems.append("kv_cache_scheme is dynamic, and scales of a checkpoint are static.")
    if not scheme.get("symmetric", True):
        problems.append(f"kv_cache_scheme is asymmetric, and {release.name} knows no zero points.")
    strategy = scheme.get("strategy", "tensor")
    if strategy not in ("tensor", "attn_head"):
        problems.append(f"kv_cache_scheme has the strategy {strategy!r}, and {release.name} takes 'tensor' or "
                        "'attn_head'.")  # fmt: skip
    if strategy == "attn_head" and reader.head is None:
        problems.append(f"kv_cache_scheme has one scale a head, and {release.name} reads one a layer.")
    return problems


def _scale_findings(
    folder: Folder, model: ModelSpec, release: Release, reader: Reader, scales: Scales, skipped: tuple[str, ...]
) -> list[Finding]:
    """Scales that the engine would not find, and what it would put in their place."""
    found = []
    missing = f"{release.title} would use {reader.missing}"
    for layer, side in scales.half():
        found.append(error("scales", f"layer {layer} has no {side} scale: {missing}."))
    empty = [i for i in scales.without() if not _is_skipped(model.layers[i], skipped)]
    if empty:
        found.append(error("scales", f"layers {_ranges(empty)} have no scales: {missing}."))
    if scales.found:
        found += _naming_findings(folder, release, reader, scales)
    strategy = (folder.quantization.get("kv_cache_scheme") or {}).get("strategy", "tensor")
    expected = "head" if strategy == "attn_head" else "tensor"
    if scales.granularity not in (None, expected) and not (expected == "head" and _one_head(scales)):
        found.append(error("scales", f"are one a {scales.granularity}, and kv_cache_scheme says one a {expected}."))
    condition = getattr(reader, expected)
    if condition:
        found.append(warning("scales", f"one a {expected} is read {condition}."))
    if skipped:
        flag = f"{release.skip_flag} {' '.join(skipped)}"
        found.append(warning("serving", f"layers without scales stay in 16 bits only with {flag}."))
    if reader.flag:
        found.append(warning("serving", f"the cache becomes FP8 only with {release.dtype_flag} {reader.flag}."))
    return found


def _naming_findings(folder: Folder, release: Release, reader: Reader, scales: Scales) -> list[Finding]:
    """Scales that lie where, or are spelled as, this engine does not look for them."""
    architecture = (folder.config.get("architectures") or ["?"])[0]
    accepted = set(reader.spelled)
    if release.architectures is not None:
        spelling = release.architectures.get(architecture)
        if spelling is None:
            return [error("config.json", f"{release.name} loads no KV scales for {architecture}.")]
        accepted = accepted if spelling == "mapped" else {spelling}
    found = []
    for spelling in sorted(scales.spelled - accepted):
        found.append(error("scales", f"are spelled as {spelling!r} names, which {release.name} does not read here."))
    odd = sorted({m.rsplit(".", 1)[-1] for m in scales.layers.values()} - set(release.modules))
    if odd:
        found.append(error("scales", f"belong to modules named {odd[0]!r}, where {release.name} does not look."))
    return found


def _unused(scales: Scales | None) -> list[Finding]:
    if scales is None or not scales.found:
        return []
    return [error("config.json", f"says nothing of a quantized KV cache, and there are {len(scales.found)} scales.")]


def _skipped(folder: Folder, model: ModelSpec, scales: Scales) -> tuple[str, ...]:
    """Layers that are meant to stay in 16 bits: those the recipe keeps exact, and windows that nobody measured."""
    exact: list[str] = []
    recipe, empty = _recipe(folder), set(scales.without())
    for layer in model.layers if recipe else ():
        if layer.index in empty and recipe.for_head(layer.index, 0, len(model.layers)).is_exact:
            exact.append(str(layer.index))
    windows = [layer.index for layer in model.layers if layer.kind == "sliding"]
    unmeasured = windows and set(windows) <= set(scales.without())
    return (*exact, *(("sliding_window",) if unmeasured else ()))


def _own_flag(folder: Folder, release: Release) -> str | None:
    """The engine's own cache dtype that a folder without scales was written for."""
    target, recipe = TARGETS.get(folder.written_by), _recipe(folder)
    if target is None or recipe is None or target.engines[0] != release.engine:
        return None
    return takes(target, recipe)


def _recipe(folder: Folder) -> Recipe | None:
    """The recipe that lies in a folder; None if there is none that can be read."""
    try:
        return load_recipe(folder.path / RECIPE)
    except RecipeError:
        return None


def _is_skipped(layer, skipped: tuple[str, ...]) -> bool:
    return str(layer.index) in skipped or (layer.kind == "sliding" and "sliding_window" in skipped)


def _has_kv_scheme(folder: Folder, scales: Scales | None) -> bool:
    # FP8 checkpoints may hold scales without saying so in the config.
    undeclared = folder.quantization.get("quant_method") == "fp8" and bool(scales and scales.found)
    return has_kv_scheme(folder.quantization) or undeclared


def _one_head(scales: Scales) -> bool:
    """True if one scale a layer may as well be one a head: shapes [1, 1, 1] are written for models with one KV head."""
    return all(scale.ndim == 3 for scale in scales.found.values())


def _ranges(indices: list[int]) -> str:
    return ", ".join(map(str, indices)) if len(indices) < 6 else f"{indices[0]} to {indices[-1]} ({len(indices)})"
