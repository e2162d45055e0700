"""What an evaluation works on: a loaded model, its tokenizer, and the plan of its cache."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvq.cache import CachePlan, make_plan
from kvq.calib.check import checked_artefacts
from kvq.calib.stats import Stats
from kvq.errors import RecipeError
from kvq.exporting.checkpoint import PROVENANCE
from kvq.exporting.exporter import is_export
from kvq.exporting.simulated_engine import is_engine_export, simulated_config, simulated_plan
from kvq.models.describe import describe
from kvq.models.resolve import load_config, load_model, load_tokenizer, resolve_model, weights_fingerprint
from kvq.recipe import Recipe, load_recipe


@dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
    """name: for people, never a folder of this machine. folder: the checkpoint's. cache_dtype: of the checkpoint, which
    exact tokens take."""

    name: str
    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    plan: CachePlan
    cache_dtype: torch.dtype

    @property
    def quantizes(self) -> bool:
        return bool(self.plan.layers)

    @property
    def exact(self) -> "EvaluatedModel":
        """The same model without quantization."""
        return replace(self, plan=CachePlan(recipe=self.plan.recipe, model=self.plan.model, layers={}))

    @property
    def source(self) -> str:
        """Fingerprint of the weights that this model, or the model that it is an export of, has."""
        if not is_export(self.folder):
            return weights_fingerprint(self.folder)
        return json.loads((self.folder / PROVENANCE).read_bytes())["weights_fingerprint"]

    def plan_for(self, recipe: Recipe | str | Path, stats: Stats | str | Path | None = None) -> CachePlan:
        """The plan of another recipe on this model, which must not be an export."""
        chosen = load_recipe(recipe)
        spec = self.plan.model
        return make_plan(chosen, spec, checked_artefacts(chosen, spec, stats, self.folder))


def load_evaluated(
    model: str | Path,
    recipe: Recipe | str | Path | None = None,
    *,
    stats: Stats | str | Path | None = None,
    dtype: torch.dtype | str | None = None,
) -> EvaluatedModel:
    """Load an export with its own recipe, or any model with ``recipe`` (None: fp16, nothing quantized).

    An export for a serving engine is loaded with the FP8 cache that the engine would keep.

    stats   statistics of this model, or their file, for a recipe that needs them.
    dtype   as ``kvq.models.resolve.load_model`` takes it.

    Raises RecipeError for a second recipe on an export and for missing scales, ModelNotFoundError, CheckpointError or
    UnsupportedModelError as the model demands.
    """
    folder = resolve_model(model)
    spec = describe(load_config(folder))
    name = model if isinstance(model, str) and not Path(model).exists() else folder.resolve().name
    if is_export(folder):
        if recipe is not None:
            raise RecipeError(
                f"{name!r} is an export and brings its own recipe: leave the recipe out, or name its base model."
            )
        loaded = load_model(folder, dtype=dtype)
        plan = loaded.kvq.plan
    elif recipe is None and is_engine_export(folder):
        loaded = load_model(folder, dtype=dtype, config=simulated_config(folder))
        plan = simulated_plan(folder)
    else:
        chosen = load_recipe(recipe or "fp16")
        plan = make_plan(chosen, spec, checked_artefacts(chosen, spec, stats, folder))
        loaded = load_model(folder, dtype=dtype)
    return EvaluatedModel(
        name=name, folder=folder, model=loaded, tokenizer=load_tokenizer(folder), plan=plan, cache_dtype=spec.dtype
    )
