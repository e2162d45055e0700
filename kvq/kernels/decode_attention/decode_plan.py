"""How one decode launch is cut, and where its partial results go: chosen on the device, so a graph can replay it.

A program handles a run of *rounds* (``Tile.round`` tokens) of one sequence and KV head. All runs have at most ``c``
rounds; ``c`` is the one that minimises

    waves * (c + OVERHEAD),  waves = ceil(programs / slots),  programs = KV heads * sum of ceil(rounds / c)

so a long sequence beside short ones is cut into as many equal runs as fill the machine, and nothing is cut finer than
pays for the partial results that it writes.
"""

import math
from dataclasses import dataclass, replace
from functools import cache

import torch

from kvq.kernels.dispatch import Choice, capability, choose, why_no_attention
from kvq.kernels.geometry import MAX_SPLITS, OVERHEAD, Side, Tile, sides_of, tile_of
from kvq.kernels.tables import Parameters, decode_parameters
from kvq.pages.layout import PageLayout

# Query columns of a program, a power of two.
MOST_COLUMNS = 16
# Columns of a matrix product.
PRODUCT_COLUMNS = 8
# Waves that the work list has room for.
MOST_WAVES = 2
ITEM = 4
MOST_REGISTERS = 255
# Rounds that a program turns its queries for at a time: they stay in an H200's cache (50 MB) while they are read.
TURNED_ROUNDS = 8


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Everything about a decode launch that does not change from step to step."""

    layout: PageLayout
    key: Side
    value: Side
    tile: Tile
    parameters: Parameters
    heads: int
    group: int
    queries: int
    columns: int
    sm: int

    @property
    def column_blocks(self) -> int:
        return -(-self.group * self.queries // self.columns)

    @property
    def turned_columns(self) -> int:
        """Query columns of a program that are turned, a power of two."""
        return min(self.columns, 1 << (self.group * self.queries - 1).bit_length())

    @property
    def turned_blocks(self) -> int:
        """Blocks of the frame that queries are turned to at a time, the one included that may begin before."""
        return -(-TURNED_ROUNDS * self.tile.round // self.tile.frame) + 1 if self.tile.frame else 0


@cache
def geometry_of(layout: PageLayout, heads: int, group: int, queries: int, sm: int, frame: int = 0) -> Geometry:
    """heads: KV heads; group: query heads of a KV head; queries: query tokens; sm: compute capability, 90 for 9.0;
    frame: see ``Tile``."""
    key, value = sides_of(layout)
    columns = min(MOST_COLUMNS, 1 << (group * queries - 1).bit_length())
    if key.by_channel or frame:
        # Queries are scaled or turned for every page: with as many columns as a product has, in its own arrangement.
        columns = max(columns, PRODUCT_COLUMNS)
    parameters = decode_parameters(key, value, columns, sm)
    if frame:
        # Turning takes more registers than the loop: nothing else is spilled for it.
        parameters = replace(parameters, registers=MOST_REGISTERS)
    shape = {"warps": parameters.warps, "rows": parameters.rows, "split": parameters.split}
    tile = tile_of(key, value, **shape, frame=frame)
    return Geometry(
        layout=layout,
        key=key,
        value=value,
        tile=tile,
        parameters=parameters,
        heads=heads,
        group=group,
        queries=queries,
        columns=columns,
        sm=sm,
    )


class DecodePlan:
    """Work list and workspaces of ``decode_attention`` for a batch; one plan serves every layer of a step.

    Everything is allocated here. ``update`` looks at lengths on the device only, so a captured graph may replay it with
    other lengths. ``frame``: tokens of a block of the keys' frame (``KeyFrame.block``), 0 without one.

    ran   which implementation of ``update`` ran last.
    """

    def __init__(
        self,
        layout: PageLayout,
        *,
        batch: int,
        heads: int,
        group: int,
        queries: int = 1,
        device: torch.device | str = "cpu",
        slots: int | None = None,
        frame: int = 0,
        impl: str = "auto",
    ):
        self.device, self.frame = torch.device(device), frame
        self.ran: Choice = choose(impl, self.device, why_no_attention(layout, frame))
        self.layout, self.batch, self.heads, self.group, self.queries = layout, batch, heads, group, queries
        if self.ran.impl == "reference":
            return
        self.geometry = geometry_of(layout, heads, group, queries, capability(self.device), frame)
        programs = heads * self.geometry.column_blocks
        self.slots = slots or self._slots()
        self.capacity = batch + -(-MOST_WAVES * self.slots // programs)
        columns, head_dim = group * queries, layout.key.head_dim
        made = {"device": self.device, "dtype": torch.int32}
        self.items = torch.full((self.capacity, ITEM), -1, **made)
        self.spans = torch.zeros(batch, 2, **made)
        partials = (self.capacity + batch, heads, columns)
        self.partial = torch.empty(*partials, head_dim, device=self.device)
        self.partial_lse = torch.empty(partials, device=self.device)
        self.lse = torch.empty(batch, heads, columns, device=self.device)
        turned = partials[0] * programs, self.geometry.turned_blocks, self.geometry.turned_columns
        self.turned = torch.empty(*turned, head_dim, dtype=torch.float16, device=self.device)
        self.turned_bias = torch.empty(turned, device=self.device)

    def _slots(self) -> int:
        """Programs that run at once."""
        if self.device.type != "cuda":
            return 8
        count = torch.cuda.get_device_properties(self.device).multi_processor_count
        return count * self.geometry.parameters.programs

    def update(
        self,
        lengths: torch.Tensor,
        positions: torch.Tensor | None = None,
        window: int | None = None,
        first_token: int = 0,
    ) -> None:
        """Cut the work for packed ``lengths`` [B] int32.

        With a sliding ``window``, ``positions`` [B] int32 are those of the first query token and ``first_token`` that
        of the first packed token, and only rounds that some query sees are listed.
        """
        if self.ran.impl == "reference":
            return
        from kvq.kernels.decode_attention.plan_items import plan_launch

        plan_launch(
            lengths,
            positions,
            self.items,
            self.spans,
            slots=self.slots,
            programs=self.heads * self.geometry.column_blocks,
            tile=self.geometry.tile,
            queries=self.queries,
            window=window,
            first_token=first_token,
        ).run()

    @property
    def nbytes(self) -> int:
        """Bytes of the workspaces."""
        held = (
            getattr(self, name, None)
            for name in ("items", "spans", "partial", "partial_lse", "lse", "turned", "turned_bias")
        )
        return sum(tensor.nbytes for tensor in held if tensor is not None)


def choose_run(rounds: list[int], programs_per_item: int, slots: int, capacity: int) -> int:
    """Rounds of a run, the rule that the device follows. ``capacity``: most items that the work list can hold."""
    longest = max(rounds, default=0)
    best, best_cost = max(1, longest), math.inf
    for splits in range(1, MAX_SPLITS + 1):
        run = max(1, -(-longest // splits))
        items = sum(-(-r // run) for r in rounds)
        cost = -(-items * programs_per_item // slots) * (run + OVERHEAD)
        if items <= capacity and cost < best_cost:
            best, best_cost = run, cost
    return best


def work_list(rounds: list[int], firsts: list[int], run: int) -> tuple[list[list[int]], list[list[int]]]:
    """(items, spans): items [sequence, first round, rounds, 0] in order of sequence; spans [first item, items]."""
    items, spans = [], []
    for b, (count, first) in enumerate(zip(rounds, firsts)):
        spans.append([len(items), -(-count // run)])
        items += [[b, first + at, min(run, count - at), 0] for at in range(0, count, run)]
    return items, spans
