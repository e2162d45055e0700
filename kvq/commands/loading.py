"""Load an export or a plain model with a recipe, and report on the cache that it filled."""

from typing import Any

from kvq.errors import RecipeError


def load_with_cache(name: str, recipe, stats: str | None):
    """Load ``name`` and its tokenizer; a recipe is installed on a plain model for good."""
    from kvq.cache import make_plan
    from kvq.calib.artefacts import fit_artefacts
    from kvq.calib.check import check_stats
    from kvq.calib.stats import Stats
    from kvq.exporting.exporter import is_export
    from kvq.exporting.served import is_served, served_config, served_plan
    from kvq.integrations.runtime import install
    from kvq.models.describe import describe
    from kvq.models.resolve import (
        check_weights,
        load_config,
        load_model,
        load_tokenizer,
        resolve_model,
    )

    folder = resolve_model(name)
    if is_export(folder):
        if recipe is not None:
            raise RecipeError(f"{name!r} is an export and brings its own recipe: leave --recipe out, or name its base.")
        check_weights(folder)
        return _load_export(folder), load_tokenizer(folder)
    if recipe is None and is_served(folder):
        model = load_model(folder, config=served_config(folder))
        install(model, served_plan(folder))
        return model, load_tokenizer(folder)
    spec = describe(load_config(folder))
    if recipe is None:
        return load_model(folder), load_tokenizer(folder)
    statistics = Stats.load(stats) if stats else None
    if statistics is not None:
        check_stats(statistics, spec, folder)
    plan = make_plan(recipe, spec, fit_artefacts(recipe, spec, statistics, folder) if statistics else None)
    model = load_model(folder)
    install(model, plan)
    return model, load_tokenizer(folder)


def _load_export(folder):
    """Load an export as ``load_model`` loads a plain model: on the GPU if there is one, in float32 on the CPU."""
    import torch

    from kvq.integrations.transformers import load

    gpu = torch.cuda.is_available()
    return load(folder, dtype="auto" if gpu else torch.float32).to("cuda" if gpu else "cpu").eval()


def cache_report(model, cache) -> dict[str, Any]:
    """What a filled cache holds: measured bytes, the same with 16-bit exact numbers, a 16-bit cache, and what ran."""
    from kvq.cache import CachePlan, cache_nbytes, implementations
    from kvq.models.describe import describe
    from kvq.recipe import load_recipe

    tokens = cache.get_seq_length()
    runtime = getattr(model, "kvq", None)
    plain = CachePlan(recipe=load_recipe("fp16"), model=describe(model.config), layers={})
    plan = runtime.plan if runtime else plain
    return {
        "tokens": tokens,
        "bytes": cache_nbytes(cache),
        "bytes_in_16_bit": plan.predicted_bytes(tokens, itemsize=2),
        "fp16_bytes": plain.predicted_bytes(tokens, itemsize=2),
        "recipe": plan.recipe.name,
        "exact_dtype": str(model.dtype).removeprefix("torch."),
        "implementation": _implementation(runtime, implementations(cache)),
    }


def _implementation(runtime, ran: list[str]) -> str:
    if runtime is None:
        return "DynamicCache"
    return f"{runtime.attention} attention, {' and '.join(ran) or 'the prompt alone'}"
