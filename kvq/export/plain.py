"""The plain export: an ordinary checkpoint of the base architecture whose own quantized cache loses less.

All transforms of the recipe are in the weights, so any engine runs it without kvq. What the recipe says of codecs and
exact tokens stays behind: the cache is the engine's.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvq import __version__
from kvq.cache import CachePlan
from kvq.errors import RecipeError
from kvq.export.card import licence_of, plain_card
from kvq.export.checkpoint import shard_index, to_json
from kvq.export.fold_check import FoldCheck
from kvq.export.folding import FOLDED
from kvq.models.resolve import INDEX_FILE
from kvq.transforms.plan import FoldPlan


def refuse_not_plain(plan: CachePlan, folds: FoldPlan) -> None:
    """Refuse a recipe whose transforms do not all fold, with the first reason."""
    name = plan.recipe.name
    if not any(chain.steps for sides in plan.chains.values() for chain in sides.values()):
        raise RecipeError(
            f"recipe {name!r} has no transforms, so a plain export would be the model itself: use a recipe that folds, "
            "such as qoq4, or leave out --target plain."
        )
    for index, sides in folds.left.items():
        for side, reason in sides.items():
            steps = getattr(plan.recipe.for_head(index, 0, len(plan.model.layers)).transforms, side)
            kind = steps[folds.folded.get(index, {}).get(side, 0)].kind
            raise RecipeError(
                f"recipe {name!r} does not fold into this model: {side} transform {kind!r} of layer {index} stays, "
                f"because {reason}; use a recipe without it, or leave out --target plain."
            )


def plain_contents(
    source: Path,
    config: Mapping[str, Any],
    companions: Mapping[str, bytes],
    plan: CachePlan,
    check: FoldCheck,
    provenance: Mapping[str, Any],
) -> dict[str, bytes]:
    """Every file of the plain export except the weights, by name."""
    record = {
        "recipe": plan.recipe.name,
        "recipe_hash": plan.recipe.hash,
        "transforms": plan.recipe.transforms.to_dict(),
        "base_weights_fingerprint": provenance["weights_fingerprint"],
        "kvq_version": __version__,
    }
    return {
        **companions,
        "config.json": to_json({**config, FOLDED: record}),
        INDEX_FILE: shard_index(source),
        "README.md": plain_card(plan, check, provenance, licence_of(source)).encode(),
    }
