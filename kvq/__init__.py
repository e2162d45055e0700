"""kvq: KV-cache quantization from calibration to a checkpoint that loads with ``from_pretrained``.

    import kvq
    model = AutoModelForCausalLM.from_pretrained(DIR)      # an export: generate() uses the packed cache
    with kvq.quantized_cache(model, "kivi2"): ...          # any model, without an export

Importing kvq registers the transformers integration and does nothing else. Names that need torch or transformers are
imported on first use.
"""

import importlib

from kvq.errors import (
    CacheError,
    CheckpointError,
    DataError,
    KvqError,
    ModelNotFoundError,
    RecipeError,
    UnsupportedModelError,
)
from kvq.integrations import hook

_LAZY = {
    "Recipe": "kvq.recipe",
    "cache_nbytes": "kvq.cache",
    "load": "kvq.integrations.transformers",
    "load_recipe": "kvq.recipe",
    "make_plan": "kvq.cache",
    "new_cache": "kvq.integrations.runtime",
    "quantized_cache": "kvq.integrations.runtime",
}

__all__ = [
    "CacheError",
    "CheckpointError",
    "DataError",
    "KvqError",
    "ModelNotFoundError",
    "Recipe",
    "RecipeError",
    "UnsupportedModelError",
    "__version__",
    "cache_nbytes",
    "load",
    "load_recipe",
    "make_plan",
    "new_cache",
    "quantized_cache",
]


def __getattr__(name: str):
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
