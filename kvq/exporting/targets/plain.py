"""The plain target: an ordinary checkpoint of the base architecture whose own quantized cache loses less.

All transforms of the recipe are in the weights, so any engine runs it without kvq. What the recipe says of codecs and
exact tokens stays behind: the cache is the engine's.
"""

from kvq.cache import CachePlan
from kvq.errors import RecipeError
from kvq.exporting.checkpoint import shard_index, to_json
from kvq.exporting.engines import find_release
from kvq.exporting.folding import folded_field
from kvq.exporting.model_card import plain_card
from kvq.exporting.targets.base import Job, Target
from kvq.exporting.targets.kvq_format import weights
from kvq.exporting.targets.native_dtypes import engine_of, native_dtype, serve_section
from kvq.models.resolve import INDEX_FILE
from kvq.transforms.fold_plan import FoldPlan


def contents(target: Target, job: Job) -> dict[str, bytes]:
    return folded_checkpoint(target, job, shard_index(job.source), _serve(target, job))


def folded_checkpoint(target: Target, job: Job, index: bytes, serve: str) -> dict[str, bytes]:
    """Every file but weights and companions of a checkpoint of the base architecture: nothing in it names a cache.

    index   of the weights; serve: the section of the card that says how engines serve it.

    Raises RecipeError for transforms that do not fold.
    """
    refuse_not_folded(job.plan, job.folds, target.name)
    return {
        "config.json": to_json({**job.config, **folded_field(job)}),
        INDEX_FILE: index,
        **job.origin(target.name),
        "README.md": plain_card(job.plan, job.check, job.provenance, job.licence, serve).encode(),
    }


def _serve(target: Target, job: Job) -> str:
    """How engines serve the folder: with a cache dtype of their own where one stores what the recipe says."""
    engine = engine_of(job.plan.recipe)
    if engine is not None:
        return serve_section(job.folder, native_dtype(job.plan.recipe, find_release(engine)), find_release(engine))
    commands = "\n".join(find_release(name).command(job.folder) for name in target.engines[1:])
    return f"\n## Serve it\n\n```bash\n{commands}\n```\n\nWith the engine's own flag for the dtype of its cache.\n"


def refuse_not_folded(plan: CachePlan, folds: FoldPlan, target: str) -> None:
    """Refuse a recipe whose transforms do not all fold, with the first reason."""
    name = plan.recipe.name
    if not plan.has_transforms:
        raise RecipeError(
            f"recipe {name!r} has no transforms, so --target {target} would write the model itself: use a recipe that "
            "folds, such as qoq4, or --target kvq."
        )
    for index, sides in plan.chains.items():
        for side in sides:
            count, steps = folds.folded.get(index, {}).get(side, 0), plan.transforms_of(index, side)
            if count == len(steps):
                continue
            kind = steps[count].kind
            reason = folds.left.get(index, {}).get(side, "--no-fold forbids it")
            raise RecipeError(
                f"recipe {name!r} does not fold into this model: {side} transform {kind!r} of layer {index} stays, "
                f"because {reason}; use a recipe without it, or --target kvq."
            )


PLAIN = Target(
    name="plain",
    summary="an ordinary checkpoint with all transforms of the recipe in its weights, for any engine's own cache",
    engines=("transformers", "vllm", "sglang"),
    # Nothing is written of a quantization, and folding would round quantized weights again.
    formats={},
    contents=contents,
    weights=weights,
    sliding=False,
)
