"""Targets: the forms in which an export can be written. The command line, the documents and the tests read TARGETS."""

from kvq.errors import RecipeError, suggest
from kvq.exporting.targets.base import Job, Target
from kvq.exporting.targets.engine import contents, weights
from kvq.exporting.targets.kvq_format import KVQ
from kvq.exporting.targets.plain import PLAIN

__all__ = ["TARGETS", "Job", "Target", "find_target"]

_ENGINE = {"contents": contents, "weights": weights}
_COMPRESSED = dict.fromkeys((None, "compressed-tensors", "gptq", "awq"), "compressed-tensors")

TARGETS = {
    target.name: target
    for target in (
        KVQ,
        PLAIN,
        Target(
            name="vllm",
            summary="vLLM: FP8 scales in the checkpoint, one a layer or one a head",
            engines=("vllm", "transformers"),
            formats=_COMPRESSED | {"fp8": "fp8", "modelopt": "modelopt"},
            **_ENGINE,
        ),
        Target(
            name="sglang",
            summary="SGLang: FP8 scales in the checkpoint, one a layer",
            engines=("sglang",),
            formats=_COMPRESSED | {"fp8": "fp8", "modelopt": "modelopt"},
            **_ENGINE,
        ),
        Target(
            name="compressed-tensors",
            summary="compressed-tensors: read by transformers, vLLM and SGLang",
            engines=("transformers", "vllm", "sglang"),
            formats=_COMPRESSED,
            **_ENGINE,
        ),
        Target(
            name="modelopt",
            summary="NVIDIA ModelOpt: read by vLLM and SGLang, and the layout that TensorRT-LLM takes",
            engines=("vllm", "sglang"),
            formats={None: "modelopt", "modelopt": "modelopt"},
            **_ENGINE,
        ),
    )
}


def find_target(name: str) -> Target:
    """A target by name. Raises RecipeError for an unknown one."""
    if name not in TARGETS:
        raise RecipeError(f"target {name!r} is not known.{suggest(name, TARGETS)}")
    return TARGETS[name]
