"""kvq: KV-cache quantization from calibration to a checkpoint that loads with ``from_pretrained``.

    import kvq
    model = AutoModelForCausalLM.from_pretrained(DIR)      # an export: generate() uses the packed cache
    with kvq.quantized_cache(model, "kivi2"): ...          # any model, without an export

Importing kvq registers the transformers integration and does nothing else. Names that need torch or transformers are
imported on first use. ``docs/api.md`` describes each.
"""

import importlib
from typing import TYPE_CHECKING, Any

from kvq.errors import (
    CacheError,
    CheckpointError,
    DataError,
    KernelError,
    KvqError,
    ModelNotFoundError,
    RecipeError,
    UnsupportedModelError,
)
from kvq.integrations import hook

if TYPE_CHECKING:
    from kvq.api import (
        calibrate,
        compare,
        describe,
        evaluate,
        export,
        make_plan,
        memory_plan,
        search,
    )
    from kvq.cache import CachePlan, cache_nbytes
    from kvq.calib.stats import Stats
    from kvq.codecs import register_codec, register_part
    from kvq.eval.result import EvalResult
    from kvq.exporting.exporter import ExportResult
    from kvq.exporting.memory import MemoryPlan
    from kvq.integrations.runtime import new_cache, quantized_cache
    from kvq.integrations.transformers import load
    from kvq.models.describe import ModelSpec
    from kvq.models.resolve import resolve_model
    from kvq.recipe import Recipe, list_recipes, load_recipe
    from kvq.searching.outcome import Search
    from kvq.transforms import register_transform

    __version__: str

# The same names, by the module that is imported when one is first used.
_MODULES = {
    "kvq.api": ("calibrate", "compare", "describe", "evaluate", "export", "make_plan", "memory_plan", "search"),
    "kvq.cache": ("CachePlan", "cache_nbytes"),
    "kvq.calib.stats": ("Stats",),
    "kvq.codecs": ("register_codec", "register_part"),
    "kvq.eval.result": ("EvalResult",),
    "kvq.exporting.exporter": ("ExportResult",),
    "kvq.exporting.memory": ("MemoryPlan",),
    "kvq.integrations.runtime": ("new_cache", "quantized_cache"),
    "kvq.integrations.transformers": ("load",),
    "kvq.models.describe": ("ModelSpec",),
    "kvq.models.resolve": ("resolve_model",),
    "kvq.recipe": ("Recipe", "list_recipes", "load_recipe"),
    "kvq.searching.search": ("Search",),
    "kvq.transforms": ("register_transform",),
}
_LAZY = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "CacheError",
    "CachePlan",
    "CheckpointError",
    "DataError",
    "EvalResult",
    "ExportResult",
    "KernelError",
    "KvqError",
    "MemoryPlan",
    "ModelNotFoundError",
    "ModelSpec",
    "Recipe",
    "RecipeError",
    "Search",
    "Stats",
    "UnsupportedModelError",
    "__version__",
    "cache_nbytes",
    "calibrate",
    "compare",
    "describe",
    "evaluate",
    "export",
    "list_recipes",
    "load",
    "load_recipe",
    "make_plan",
    "memory_plan",
    "new_cache",
    "quantized_cache",
    "register_codec",
    "register_part",
    "register_transform",
    "resolve_model",
    "search",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value = _version()
    elif name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
    else:
        raise AttributeError(f"module 'kvq' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


def _version() -> str:
    # importlib.metadata costs more than everything else here, so it waits for the first question.
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("kvq-toolkit")
    except PackageNotFoundError:
        return "0+unknown"


hook.install()
