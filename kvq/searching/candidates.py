"""Candidates of a budget: those that treat all layers alike, and the choice among all that were measured."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from kvq.errors import DataError
from kvq.models.describe import LayerSpec
from kvq.recipe import Recipe
from kvq.searching.outcome import Candidate, Settings
from kvq.searching.sensitivity import Entry
from kvq.searching.space import Space
from kvq.searching.verify import Measured

UNIFORM_CANDIDATES = 2


def uniform_candidates(
    table: Sequence[Entry],
    space: Space,
    layers: Mapping[int, LayerSpec],
    budget: float,
    bits_of: Callable[[Recipe], float],
) -> list[Candidate]:
    """The best pairs of options for all layers alike within a budget, by what ``table`` predicts of every option."""
    sums: dict[tuple[str, str], list[float]] = {}
    total = sum(layer.kv_heads * layer.head_dim for layer in layers.values())
    for entry in table:
        if entry.policy == 0:
            layer = layers[entry.layer]
            row = sums.setdefault((entry.side, entry.option), [0.0, 0.0])
            row[0] += entry.bits * layer.kv_heads * layer.head_dim / total
            row[1] += entry.damage
    pairs = [
        (sums["key", key.name][1] + sums["value", value.name][1], key, value)
        for key in space.of("key")
        for value in space.of("value")
        if (sums["key", key.name][0] + sums["value", value.name][0]) / 2 <= budget + 1e-9
    ]
    found = []
    for predicted, key, value in sorted(pairs, key=lambda pair: pair[0]):
        recipe = key.recipe(space.tokens[0], value)
        bits = bits_of(recipe)
        if bits <= budget + 1e-9:
            found.append(Candidate(recipe=recipe, how="uniform", bits=bits, predicted=predicted))
        if len(found) == UNIFORM_CANDIDATES:
            break
    return found


def measured(rows: Sequence[Candidate], found: Mapping[str, Measured]) -> list[Candidate]:
    """Candidates with what was measured, without those that time left unmeasured."""
    return [replace(c, measured=found[c.recipe.hash]) for c in rows if c.recipe.hash in found]


def choose(budget: float, rows: Sequence[Candidate], settings: Settings) -> tuple[Candidate, Candidate | None]:
    """The best measured candidate that keeps the floors, and the best uniform one. Raises DataError if none does."""
    ranked = sorted(rows, key=lambda c: c.measured.better(settings.metric))
    kept = [c for c in ranked if not c.measured.missed(settings.floors)]
    if not kept:
        hold_floors(budget, ranked[0].measured, settings.floors)
    return kept[0], next((c for c in ranked if c.how == "uniform"), None)


def hold_floors(budget: float, found: Measured, floors: Mapping[str, float]) -> None:
    """Raise DataError for the first floor that is not kept."""
    for name, value in found.missed(floors).items():
        raise DataError(
            f"no recipe of at most {budget:g} bits keeps {name}={floors[name]:g} on unseen text (the best has "
            f"{value:.4f}): raise the budget, or change the floor."
        )
