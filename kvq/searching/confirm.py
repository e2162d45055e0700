"""What confirms a search: texts that chose nothing, and transforms that are fitted to another text."""

from collections.abc import Mapping, Sequence

import torch

from kvq.calib.artefacts import needed_artefacts
from kvq.calib.collect import collect
from kvq.calib.needs import needs_of
from kvq.models.describe import ModelSpec
from kvq.recipe import Recipe
from kvq.searching.outcome import Candidate, HeldOut
from kvq.searching.verify import Measured, Verifier


def fitted_of(recipes: Sequence[Recipe], spec: ModelSpec) -> list[Recipe]:
    """Those that are fitted to a text."""
    return [recipe for recipe in recipes if needed_artefacts(recipe, spec)]


def refitter(verifier: Verifier, recipes: Sequence[Recipe], windows: torch.Tensor) -> Verifier:
    """What measures recipes with transforms and codecs that are fitted to ``windows`` [N, T], and not to the text of
    the given statistics: bits that hold for one text alone are found out."""
    needs = frozenset().union(*(needs_of(recipe, verifier.spec) for recipe in recipes))
    other = collect(verifier.model, windows, needs=needs, batch_size=1)
    return Verifier(verifier.model, verifier.spec, other, verifier.folder, verifier.journal)


def held_out(
    chosen: Candidate, uniform: Candidate | None, given: Mapping[str, Measured], refitted: Mapping[str, Measured]
) -> HeldOut:
    """One text, of results by recipe hash. What time left unmeasured is None."""

    def found(rows: Mapping[str, Measured], candidate: Candidate | None) -> Measured | None:
        return None if candidate is None else rows.get(candidate.recipe.hash)

    return HeldOut(
        found=given[chosen.recipe.hash],
        found_refitted=found(refitted, chosen),
        uniform=found(given, uniform),
        uniform_refitted=found(refitted, uniform),
    )
