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
    table: Sequence[Entry],
    layers: Mapping[int, LayerSpec],
    budget: float,
    *,
    by_head: bool = True,
    seconds: float = SOLVER_SECONDS,
) -> Allocation:
    """Solve the allocation. ``budget``: bits per number over all layers of ``layers``, keys and values averaged.

    seconds   after which the solver gives the best that it has.

    Raises DataError if even the smallest options need more, naming what they need.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import lil_array

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
    # One policy a layer, one chain a side of a layer under its policy, one option a group of heads under its chain: the
    # columns of a row on its left add up to the one on its right, or to 1.
    switches: dict[tuple, int] = {}

    def switch(*name) -> int:
        return switches.setdefault(name, len(choices) + len(switches))

    members = defaultdict(list)
    for index, choice in enumerate(choices):
        e = choice.entry
        members[e.layer, e.policy, e.side, e.chain, choice.heads].append(index)
    chains, policies = defaultdict(set), defaultdict(set)
    for layer, policy, side, chain, _ in members:
        chains[layer, policy, side].add(chain)
        policies[layer].add(policy)
    rows = [(own, switch(*name[:4])) for name, own in members.items()]
    rows += [([switch(*name, chain) for chain in sorted(own)], switch(*name[:2])) for name, own in chains.items()]
    rows += [([switch(layer, policy) for policy in sorted(own)], None) for layer, own in policies.items()]
    count = len(choices) + len(switches)
    # Damages of one layer may be 1e-7 nats, below the solver's tolerances.
    scale = max(damages) or 1.0
    objective = np.zeros(count)
    objective[: len(choices)] = np.array(damages) / scale * 1e3
    cost = np.zeros(count)
    cost[: len(choices)] = costs
    structure = lil_array((len(rows), count))
    for line, (left, right) in enumerate(rows):
        structure[line, left] = 1.0
        if right is not None:
            structure[line, right] = -1.0
    totals = np.array([1.0 if right is None else 0.0 for _, right in rows])
    with suppress_stdout():
        found = milp(
            objective,
            integrality=np.ones(count),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(structure.tocsr(), totals, totals),
                LinearConstraint(cost[None], -np.inf, budget),
            ],
            options={"time_limit": seconds, "mip_rel_gap": RELATIVE_GAP},
        )
    if found.x is None:
        least = least_bits(table, layers)
        if budget > least + 1e-9:
            raise DataError(f"the solver found no allocation of {budget:g} bits in {seconds:.0f} s: allow more time.")
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


def least_bits(table: Sequence[Entry], layers: Mapping[int, LayerSpec]) -> float:
    """Bits per number of the smallest options, everywhere."""
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
