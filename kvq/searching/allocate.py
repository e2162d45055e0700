"""Which option each side of each layer gets: least sum of damages under a budget of bits, as an integer program.

A binary variable says that the heads of a unit take an option. Sides of one layer have one token policy, and heads of
one side of one layer have one chain of transforms. scipy's HiGHS solves it and says how far from the optimum it may be.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kvq.errors import DataError
from kvq.models.describe import LayerSpec
from kvq.searching.sensitivity import Entry
from kvq.searching.suppress_stdout import suppress_stdout

SOLVER_SECONDS = 60.0
# The solver stops once the sum is proved to be this near to the least one.
RELATIVE_GAP = 1e-4


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Heads of one side of a layer, and the entry that they take."""

    entry: Entry
    heads: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """predicted: sum of damages; bits: average over the model; bound: no allocation has a smaller sum than this.

    gap   (predicted - bound) / predicted; optimal: the solver proved it within its tolerance.
    """

    choices: tuple[Choice, ...]
    predicted: float
    bits: float
    bound: float
    gap: float
    optimal: bool


def allocate(
    table: Sequence[Entry], layers: Mapping[int, LayerSpec], budget: float, *, by_head: bool = True
) -> Allocation:
    """Solve the allocation. ``budget``: bits per number over all layers of ``layers``, keys and values averaged.

    Raises DataError if even the smallest options need more, naming what they need.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    numbers = sum(2 * layer.kv_heads * layer.head_dim for layer in layers.values())
    choices, costs, damages = [], [], []
    for entry in table:
        layer = layers[entry.layer]
        heads = range(layer.kv_heads)
        groups = [(h,) for h in heads] if by_head and entry.shares else [tuple(heads)]
        for group in groups:
            share = sum(entry.shares[h] for h in group) if entry.shares else 1.0
            choices.append(Choice(entry=entry, heads=group))
            costs.append(entry.bits * len(group) * layer.head_dim / numbers)
            damages.append(entry.damage * share)
    rows = _Rows()
    # One policy a layer, one chain a side of a layer under its policy, one option a group of heads under its chain.
    extra: dict[tuple, int] = {}

    def switch(*name) -> int:
        return extra.setdefault(name, len(choices) + len(extra))

    groups_of = defaultdict(list)
    for index, choice in enumerate(choices):
        e = choice.entry
        groups_of[e.layer, e.policy, e.side, e.chain, choice.heads].append(index)
    for (layer, policy, side, chain, _), members in groups_of.items():
        rows.add([*((m, 1.0) for m in members), (switch(layer, policy, side, chain), -1.0)], 0.0)
    chains, policies = defaultdict(set), defaultdict(set)
    for layer, policy, side, chain, _ in groups_of:
        chains[layer, policy, side].add(chain)
        policies[layer].add(policy)
    for (layer, policy, side), names in chains.items():
        parts = [(switch(layer, policy, side, name), 1.0) for name in sorted(names)]
        rows.add([*parts, (switch(layer, policy), -1.0)], 0.0)
    for layer, names in policies.items():
        rows.add([(switch(layer, policy), 1.0) for policy in sorted(names)], 1.0)
    count = len(choices) + len(extra)
    # Damages of one layer may be 1e-7 nats, below the solver's tolerances.
    scale = max(damages) or 1.0
    objective = np.zeros(count)
    objective[: len(choices)] = np.array(damages) / scale * 1e3
    cost = np.zeros(count)
    cost[: len(choices)] = costs
    entries, columns, lines, right = rows.arrays()
    structure = coo_array((entries, (lines, columns)), shape=(len(right), count)).tocsr()
    with suppress_stdout():
        found = milp(
            objective,
            integrality=np.ones(count),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(structure, right, right), LinearConstraint(cost[None], -np.inf, budget)],
            options={"time_limit": SOLVER_SECONDS, "mip_rel_gap": RELATIVE_GAP},
        )
    if found.x is None:
        least = _least_bits(table, layers)
        raise DataError(
            f"budget={budget:g} bits is below {least:.2f}, the least that this search space can store: raise it, or "
            "add smaller options to the space."
        )
    taken = [choice for choice, x in zip(choices, found.x) if x > 0.5]
    predicted = float(objective @ np.round(found.x)) * scale / 1e3
    bound = float(found.mip_dual_bound) * scale / 1e3
    return Allocation(
        choices=_joined(taken),
        predicted=predicted,
        bits=float(cost @ np.round(found.x)),
        bound=min(bound, predicted),
        gap=max(0.0, (predicted - bound) / predicted) if predicted else 0.0,
        optimal=found.status == 0,
    )


def _least_bits(table: Sequence[Entry], layers: Mapping[int, LayerSpec]) -> float:
    least: dict[tuple, float] = {}
    for entry in table:
        key = entry.layer, entry.side
        least[key] = min(least.get(key, np.inf), entry.bits)
    sizes = {index: layer.kv_heads * layer.head_dim for index, layer in layers.items()}
    return sum(bits * sizes[layer] for (layer, _), bits in least.items()) / sum(2 * size for size in sizes.values())


def _joined(choices: Sequence[Choice]) -> tuple[Choice, ...]:
    """Heads of a layer that take the same option, together."""
    heads: dict[tuple, tuple[int, ...]] = {}
    entries: dict[tuple, Entry] = {}
    for choice in choices:
        key = choice.entry.layer, choice.entry.side, choice.entry.option
        heads[key] = tuple(sorted({*heads.get(key, ()), *choice.heads}))
        entries[key] = choice.entry
    return tuple(Choice(entry=entries[key], heads=heads[key]) for key in sorted(heads))


class _Rows:
    """Equality constraints, one after the other."""

    def __init__(self):
        self.parts: list[tuple[int, int, float]] = []
        self.right: list[float] = []

    def add(self, parts: Sequence[tuple[int, float]], right: float) -> None:
        self.parts += [(len(self.right), column, value) for column, value in parts]
        self.right.append(right)

    def arrays(self):
        lines, columns, entries = (np.array(column) for column in zip(*self.parts))
        return entries, columns, lines, np.array(self.right)
