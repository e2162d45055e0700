"""What a serving engine makes of a folder: its FP8 cache as a plan of kvq, and its weights without that cache.

With both, kvq answers as the engine would, from the very scales that the engine loads.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from kvq.cache import CachePlan, make_plan
from kvq.calib.artefacts import artefact_name
from kvq.errors import CheckpointError
from kvq.exporting.check.findings import error
from kvq.exporting.check.folder import read_folder
from kvq.exporting.check.kv_scales import Scales, judge_values, read_scales
from kvq.exporting.checkpoint import RECIPE
from kvq.exporting.targets.formats import has_kv_scheme
from kvq.exporting.targets.scheme import engine_view
from kvq.models.describe import ModelSpec, describe
from kvq.models.resolve import load_config
from kvq.recipe import Recipe, load_recipe
from kvq.transforms import Transforms


def is_engine_export(folder: Path) -> bool:
    """True if a folder's config.json declares a quantized KV cache that is not kvq's own format."""
    return folder.is_dir() and (folder / "config.json").is_file() and has_kv_scheme(_quantization(load_config(folder)))


def simulated_plan(folder: Path, rounding: str = "nearest", largest: bool = False) -> CachePlan:
    """The cache that an engine keeps of this folder: FP8 with the folder's scales, sliding-window layers included.

    rounding   of the engine's conversion: see ``kvq.codecs.float8``.
    largest    take the largest of a layer's head scales for all heads, as kernels do that know one scale a layer.

    Raises CheckpointError if a scale is missing or unusable. ``kvq.exporting.check`` says more about such a folder.
    """
    read, findings = read_folder(folder, quick=True, progress=None)
    model = describe(load_config(folder))
    scales = read_scales(read, model, findings)
    findings += judge_values(scales, model, measured=read.written_by is not None)
    findings += [error("scales", f"layer {layer} has no {side} scale.") for layer, side in scales.half()]
    for finding in findings:
        if finding.level == "error":
            raise CheckpointError(f"{finding.about} of {folder.name!r}: {finding.text} 'kvq check' says more.")
    if not scales.found:
        raise CheckpointError(f"{folder.name!r} holds no KV scales that an engine would find: export it again.")
    view = engine_view(model)
    recipe = _recipe(folder, view, scales)
    plan = make_plan(recipe, view, _artefacts(recipe, scales, largest))
    layers = {
        index: tuple(replace(group, codecs=_rounded(group.codecs, rounding)) for group in groups)
        for index, groups in plan.layers.items()
    }
    return replace(plan, model=model, layers=layers)


def simulated_config(folder: Path) -> PretrainedConfig:
    """The folder's config for loading its weights alone: as they are quantized, with an unquantized cache."""
    config = load_config(folder)
    quantization = _quantization(config)
    if not quantization:
        return config
    weights = {k: v for k, v in quantization.items() if k not in ("kv_cache_scheme", "kv_cache_quant_algo")}
    unquantized = weights.get("ignore") == ["*"] or weights.get("config_groups") == {}
    if unquantized:
        del config.quantization_config
    else:
        config.quantization_config = weights
    return config


def _quantization(config: PretrainedConfig) -> dict[str, Any]:
    found = getattr(config, "quantization_config", None) or {}
    return dict(found) if isinstance(found, Mapping) else found.to_dict()


def _artefacts(recipe: Recipe, scales: Scales, largest: bool) -> dict[str, torch.Tensor]:
    found = {}
    for (layer, side), scale in scales.found.items():
        numbers = scale.double().flatten()
        numbers = numbers.max().expand_as(numbers) if largest else numbers
        by_head = getattr(recipe, side).has_head_scales
        found[artefact_name(layer, side, "scale")] = numbers if by_head else numbers.reshape(())
    return found


def _recipe(folder: Path, view: ModelSpec, scales: Scales) -> Recipe:
    """The recipe that was exported, without its transforms, which are in the weights; a stranger's checkpoint is taken
    for the recipe ``fp8``. Layers without scales are exact."""
    own = folder / RECIPE
    recipe = load_recipe(own if own.is_file() else "fp8")
    if not own.is_file() and scales.granularity == "head":
        recipe = recipe.override({"key.granularity": "head", "value.granularity": "head"})
    exact = {"key": {"codec": "exact"}, "value": {"codec": "exact"}}
    empty = [layer.index for layer in view.full_layers if layer.index in scales.without()]
    layers = {pattern: {k: v for k, v in own.items() if k != "transforms"} for pattern, own in recipe.layers.items()}
    return replace(
        recipe,
        transforms=Transforms(),
        layers={pattern: own for pattern, own in layers.items() if own}
        | ({",".join(map(str, empty)): exact} if empty else {}),
    )


def _rounded(codecs, rounding: str):
    return {side: replace(codec, rounding=rounding) for side, codec in codecs.items()}
