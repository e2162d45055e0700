"""Targets that serving engines load: the model's own weights, FP8 scales as tensors, and the config that names them."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kvq.errors import CheckpointError, RecipeError, UnsupportedModelError
from kvq.exporting.checkpoint import RECIPE, shard_index, to_json
from kvq.exporting.engines import SPELLINGS, Release, find_release
from kvq.exporting.folding import folded_field
from kvq.exporting.targets.base import Job, Target
from kvq.exporting.targets.engine_card import engine_card
from kvq.exporting.targets.formats import FORMATS, has_kv_scheme, has_packed_zeros
from kvq.exporting.targets.native_dtypes import engine_of, serve_section, takes
from kvq.exporting.targets.plain import folded_checkpoint
from kvq.exporting.targets.scheme import Scheme, fp8_scheme
from kvq.models.names import attention_modules, shared_layers
from kvq.models.resolve import INDEX_FILE, check_weights
from kvq.models.stored import serialized, tensors_of

SCALES = "kv_scales.safetensors"
# transformers takes a file of this name for the whole model and never opens the index.
_SINGLE, _RENAMED = "model.safetensors", "model-00001-of-00001.safetensors"


def contents(target: Target, job: Job) -> dict[str, bytes]:
    """Config, index, scales and side files; raises for what the target's main engine cannot read."""
    dtype, release = takes(target, job.plan.recipe), find_release(target.engines[0])
    if dtype is not None:
        return _own_cache(target, job, dtype, release)
    method = target.formats[(job.quantized or {}).get("quant_method")]
    if has_kv_scheme(job.quantized):
        raise CheckpointError(
            f"model {job.source.name!r} has a quantized KV cache of its own: export the checkpoint without one."
        )
    if has_packed_zeros(job.quantized) and not release.readers[method].zeros:
        raise CheckpointError(
            f"model {job.source.name!r} has packed weights with zero points, which {release.title} does not load from "
            "compressed-tensors checkpoints: use --target vllm."
        )
    scheme = _scheme(job, release, method)
    build, spelling = FORMATS[method]
    spelling = _spelling(release, method, spelling, job)
    scheme = _with_shared(job, scheme)
    modules = _modules(job, scheme, release)
    tensors = scale_tensors(scheme, modules, spelling)
    quantization, files = build(job.quantized, scheme, job.companions)
    return {
        "config.json": to_json(merged_config(job.config, quantization) | folded_field(job)),
        INDEX_FILE: _index(job.source, tensors),
        SCALES: b"".join(serialized(tensors, {"format": "pt", "target": target.name, "written_by": "kvq"})),
        **files,
        **job.origin(target.name),
        RECIPE: job.plan.recipe.to_yaml().encode(),
        "README.md": engine_card(target, job, scheme, method, tensors).encode(),
    }


def _own_cache(target: Target, job: Job, dtype: str, release: Release) -> dict[str, bytes]:
    """For an engine's own cache dtype: the transforms are in the weights, and the engine computes all scales.

    The serve command's flag alone says how the cache is stored. Raises RecipeError for transforms that do not fold.
    """
    recipe = job.plan.recipe
    if not recipe.transforms.to_dict():
        raise RecipeError(
            f"recipe {recipe.name!r} needs no export for {release.title}, which stores that by itself: "
            f"{release.command('MODEL', dtype)}"
        )
    serve = serve_section(job.folder, dtype, release)
    files = folded_checkpoint(target, job, _index(job.source, {}), serve)
    return {**files, RECIPE: recipe.to_yaml().encode()}


def weights(source: Path) -> dict[str, Path]:
    """The source's shards; a single file is renamed, so that the index is read (see ``_SINGLE``)."""
    return {_RENAMED if file.name == _SINGLE else file.name: file for file in check_weights(source)}


def scale_tensors(scheme: Scheme, modules: Mapping[int, str], spelling: str) -> dict[str, torch.Tensor]:
    """Scales by tensor name: float32 [1], or [kv_heads, 1, 1] with one scale a head."""
    tensors = {}
    for index, module in sorted(modules.items()):
        for side, scale in scheme.scales[index].items():
            name = SPELLINGS[spelling].format(module=module, s=side[0])
            tensors[name] = scale.view(-1, 1, 1).clone() if scheme.granularity == "head" else scale.clone()
    return tensors


def _scheme(job: Job, release: Release, method: str) -> Scheme:
    instead = engine_of(job.plan.recipe) or "kvq"
    scheme = fp8_scheme(job.plan.recipe, job.plan.model, job.artefacts, job.folds, instead)
    if scheme.granularity == "head" and release.readers[method].head is None:
        raise RecipeError(
            f"recipe {job.plan.recipe.name!r} has one scale a head, and {release.title} reads one a layer from "
            f"{method} checkpoints: set key.granularity=tensor value.granularity=tensor."
        )
    windows = job.plan.model.layers == job.model.layers and any(la.kind == "sliding" for la in job.model.layers)
    scheme = replace(scheme, windows=windows)
    if windows and not release.skip_flag:
        raise RecipeError(
            f"{release.title} quantizes sliding-window layers too, and the statistics hold none of them: run 'kvq "
            "calibrate' again, or use --target vllm."
        )
    if scheme.exact and not release.skip_flag:
        raise RecipeError(
            f"recipe {job.plan.recipe.name!r} keeps layers {', '.join(map(str, scheme.exact))} exact, and "
            f"{release.title} has one cache dtype for all layers: remove them from the recipe, or use --target vllm."
        )
    return scheme


def _with_shared(job: Job, scheme: Scheme) -> Scheme:
    """Add layers that read another layer's cache: each dequantizes with a scale that it holds itself."""
    shared = {reader: owner for reader, owner in shared_layers(job.model.config).items() if owner in scheme.scales}
    return replace(scheme, scales={**scheme.scales, **{r: scheme.scales[owner] for r, owner in shared.items()}})


def _spelling(release: Release, method: str, own: str, job: Job) -> str:
    """How the engine wants this architecture's scales spelled; the format's own way where the engine has no wish."""
    if release.architectures is None:
        return own
    names = job.config.get("architectures") or ["?"]
    found = release.architectures.get(names[0])
    if found is None:
        raise UnsupportedModelError(
            f"{release.name} loads no KV scales for {names[0]}: its FP8 cache would use a scale of 1.0; use --target "
            "vllm."
        )
    if found != "mapped" and method != "compressed-tensors":
        raise UnsupportedModelError(
            f"{release.name} loads KV scales of {names[0]} from compressed-tensors checkpoints only: use --target vllm."
        )
    return own if found == "mapped" else found


def _modules(job: Job, scheme: Scheme, release: Release) -> dict[int, str]:
    """Attention module of every layer that needs scales, in the checkpoint's own names."""
    names = tensors_of(job.source)
    clash = next((name for name in names if name.endswith((".k_scale", ".v_scale", ".kv_scale"))), None)
    if clash:
        raise CheckpointError(
            f"the weights of {job.source.name!r} hold KV scales already ({clash!r}): export a checkpoint without them."
        )
    modules = attention_modules(names, scheme.scales)
    odd = next((module for module in modules.values() if module.rsplit(".", 1)[-1] not in release.modules), None)
    if odd:
        raise UnsupportedModelError(
            f"{release.title} looks for KV scales in modules named {', '.join(release.modules)}, and this model's "
            f"attention is {odd!r}: use --target kvq."
        )
    return modules


def merged_config(config: Mapping[str, Any], quantization: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the new ``quantization_config`` at the top, where every engine looks."""
    data = {**config, "quantization_config": quantization}
    if isinstance(data.get("text_config"), Mapping) and "quantization_config" in data["text_config"]:
        data["text_config"] = {k: v for k, v in data["text_config"].items() if k != "quantization_config"}
    return data


def _index(source: Path, tensors: Mapping[str, torch.Tensor]) -> bytes:
    index = json.loads(shard_index(source))
    weight_map = {name: _RENAMED if file == _SINGLE else file for name, file in index["weight_map"].items()}
    weight_map |= dict.fromkeys(tensors, SCALES)
    metadata = dict(index.get("metadata") or {})
    metadata["total_size"] = metadata.get("total_size", 0) + sum(tensor.nbytes for tensor in tensors.values())
    return to_json({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})
