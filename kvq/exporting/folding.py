"""Transforms on their way into a checkpoint's weights: the plan of a model folder, and its record."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvq import __version__
from kvq.cache import CachePlan
from kvq.errors import CheckpointError, UnsupportedModelError
from kvq.exporting.manifest import read_manifest
from kvq.models.architecture import describe_attention
from kvq.models.rope import rope_of
from kvq.models.stored import tensors_of
from kvq.transforms.fold_plan import FoldPlan, plan_folds

# Field of config.json that says which transforms the weights have taken over.
FOLDED = "kvq_folded"
FRAMED = {
    "key": "it acts on keys relative to their block, which weights do not know",
    "value": "it acts on what is packed, and exact tokens stay as they are",
}


def plan_of_folds(plan: CachePlan, source: Path) -> FoldPlan:
    """What of a recipe's transforms the weights in ``source`` can take over."""
    if not plan.has_transforms:
        return FoldPlan()
    try:
        rope = rope_of(plan.model.config)
    except UnsupportedModelError:
        rope = "the rotary embedding is of an unusual form"
    head_dims = {layer.index: layer.head_dim for layer in plan.model.full_layers}
    folds = plan_folds(plan.chains, head_dims, describe_attention(plan.model.config), rope, tensors_of(source))
    framed = {index: {side: FRAMED[side] for side, n in own.items() if n} for index, own in plan.framed.items()}
    framed = {index: own for index, own in framed.items() if own}
    return replace(folds, left={i: {**framed.get(i, {}), **folds.left.get(i, {})} for i in {**framed, **folds.left}})


def folded_field(job) -> dict[str, Any]:
    """What config.json says of transforms in the weights, so that nobody folds twice; {} if there are none.

    job   a ``kvq.exporting.targets.base.Job``.
    """
    if not job.folds.operations:
        return {}
    record = {
        "recipe": job.plan.recipe.name,
        "recipe_hash": job.plan.recipe.hash,
        "transforms": job.plan.recipe.transforms.to_dict(),
        "base_weights_fingerprint": job.provenance["weights_fingerprint"],
        "kvq_version": __version__,
    }
    return {FOLDED: record}


def refuse_second_fold(config: Mapping[str, Any], folds: FoldPlan) -> None:
    """Refuse weights that have taken over transforms already: a second fold would round rounded numbers again."""
    if folds.operations and FOLDED in config:
        raise CheckpointError(
            f"the weights of this model have taken over the transforms of recipe {config[FOLDED].get('recipe')!r} "
            "already: fold into the original checkpoint instead, or add --no-fold."
        )


def is_plain_export(folder: Path) -> bool:
    """True if kvq wrote a folder as an ordinary checkpoint with transforms in its weights.

    Raises CheckpointError for an altered manifest.
    """
    manifest = read_manifest(folder)
    return manifest is not None and manifest["target"] == "plain"


def fold_lines(plan: CachePlan, folds: FoldPlan) -> Iterator[str]:
    """What became of the transforms, one line for each side of layers that are alike."""
    alike: dict[tuple, list[int]] = {}
    for index, sides in plan.chains.items():
        for side in sides:
            kinds = tuple(step.kind for step in plan.transforms_of(index, side))
            if kinds:
                count = folds.folded.get(index, {}).get(side, 0)
                reason = folds.left.get(index, {}).get(side)
                alike.setdefault((side, kinds[:count], kinds[count:], reason), []).append(index)
    for (side, folded, online, reason), layers in alike.items():
        parts = [f"{', '.join(folded)} in the weights"] if folded else []
        if online:
            parts.append(f"{', '.join(online)} while the model runs" + (f" ({reason})" if reason else ""))
        yield f"{side}s of {_layers(layers)}: {'; '.join(parts)}"


def _layers(indices: list[int]) -> str:
    if len(indices) > 1 and indices == list(range(indices[0], indices[-1] + 1)):
        return f"layers {indices[0]} to {indices[-1]}"
    return f"layer{'s' if len(indices) > 1 else ''} {', '.join(map(str, indices))}"
