"""``quantization_config`` with KV scales, one function for each way in which engines store them.

Each takes the source's own ``quantization_config`` (None for unquantized weights) and returns the one to write; what it
says of the weights is kept as it is. The files that belong to it are returned beside.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from kvq.errors import CheckpointError
from kvq.exporting.checkpoint import to_json
from kvq.exporting.targets.scheme import Scheme

HF_QUANT_CONFIG = "hf_quant_config.json"

Written = tuple[dict[str, Any], dict[str, bytes]]


def compressed_tensors(source: Mapping[str, Any] | None, scheme: Scheme, companions: Mapping[str, bytes]) -> Written:
    """compressed-tensors: ``kv_cache_scheme`` beside the weights' config groups, which may be none."""
    config = dict(
        source
        or {
            "quant_method": "compressed-tensors",
            "format": "dense",
            "quantization_status": "frozen",
            "config_groups": {},
            "ignore": [],
        }
    )
    # vLLM passes head counts on to the scales' loader only if this field is there.
    config.setdefault("config_groups", {})
    config["kv_cache_scheme"] = {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "attn_head" if scheme.granularity == "head" else "tensor",
        "dynamic": False,
        "group_size": None,
    }
    return config, {}


def modelopt(source: Mapping[str, Any] | None, scheme: Scheme, companions: Mapping[str, bytes]) -> Written:
    """ModelOpt: the scheme in config.json, and the older ``hf_quant_config.json`` with the same content.

    Engines refuse a ModelOpt config without an algorithm for the weights, so unquantized weights are declared as FP8
    with every module excluded.
    """
    if source is None:
        config: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["*"]}
        older: dict[str, Any] = {"quantization": {"quant_algo": "FP8", "exclude_modules": ["*"]}}
    else:
        config = dict(source)
        try:
            older = json.loads(companions.get(HF_QUANT_CONFIG, b"null"))
            older = {**older, "quantization": dict(older["quantization"])} if older else {}
        except (ValueError, TypeError, KeyError):
            raise CheckpointError(f"{HF_QUANT_CONFIG} cannot be read: copy or download the model again.") from None
    # In the older form, config.json holds the whole of the older file.
    if "quantization" in config:
        config["quantization"] = {**config["quantization"], "kv_cache_quant_algo": "FP8"}
    config["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "dynamic": False}
    if older:
        older["quantization"]["kv_cache_quant_algo"] = "FP8"
    return config, {HF_QUANT_CONFIG: to_json(older)} if older else {}


def fp8(source: Mapping[str, Any] | None, scheme: Scheme, companions: Mapping[str, bytes]) -> Written:
    """FP8 weights: SGLang reads ``kv_cache_quant_algo``; vLLM loads the scales and needs its cache dtype flag."""
    return {**source, "kv_cache_quant_algo": "FP8"}, {}


# quant_method that is written -> function, and how the scales' names are spelled.
FORMATS: dict[str, tuple[Callable[..., Written], str]] = {
    "compressed-tensors": (compressed_tensors, "attention"),
    "modelopt": (modelopt, "projection"),
    "fp8": (fp8, "attention"),
}


def has_kv_scheme(config: Mapping[str, Any] | None) -> bool:
    """True if a ``quantization_config`` quantizes the KV cache already."""
    config = config or {}
    inner = config.get("quantization") if isinstance(config.get("quantization"), Mapping) else {}
    return any(part.get(name) for part in (config, inner) for name in ("kv_cache_scheme", "kv_cache_quant_algo"))


def has_packed_zeros(config: Mapping[str, Any] | None) -> bool:
    """True if a ``quantization_config`` says that packed integer weights have zero points."""
    groups = (config or {}).get("config_groups")
    if (config or {}).get("format") != "pack-quantized" or not isinstance(groups, Mapping):
        return False
    weights = [group.get("weights") for group in groups.values() if isinstance(group, Mapping)]
    return any(isinstance(own, Mapping) and own.get("symmetric") is False for own in weights)
