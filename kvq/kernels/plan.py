"""How one decode launch is cut: work items, their number, and the workspaces, without a look at the host.

A program handles a run of *rounds* (``Tile.round`` tokens) of one sequence and KV head. All runs have at most ``c``
rounds; ``c`` is the one that minimises

    waves * (c + OVERHEAD),   waves = ceil(programs / slots),   programs = KV heads * sum over sequences of ceil(rounds / c)

so a long sequence beside short ones is cut into as many equal runs as fill the machine, and nothing is cut finer than
pays for the partial results that it writes.
"""

import math

# What a program costs besides its rounds (query, merge of warps, partial result), in rounds.
OVERHEAD = 2
MAX_SPLITS = 128


def choose_run(rounds: list[int], programs_per_item: int, slots: int, capacity: int) -> int:
    """Rounds of a run. ``capacity``: most items that the work list can hold."""
    longest = max(rounds, default=0)
    best, best_cost = max(1, longest), math.inf
    for splits in range(1, MAX_SPLITS + 1):
        run = max(1, -(-longest // splits))
        items = sum(-(-r // run) for r in rounds)
        if items > capacity:
            break
        cost = -(-items * programs_per_item // slots) * (run + OVERHEAD)
        if cost < best_cost:
            best, best_cost = run, cost
    return best


def work_list(rounds: list[int], firsts: list[int], run: int) -> tuple[list[list[int]], list[list[int]]]:
    """(items, spans): items [sequence, first round, rounds, 0] in order of sequence; spans [first item, items]."""
    items, spans = [], []
    for b, (count, first) in enumerate(zip(rounds, firsts)):
        spans.append([len(items), -(-count // run)])
        items += [[b, first + at, min(run, count - at), 0] for at in range(0, count, run)]
    return items, spans
