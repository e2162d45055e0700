"""Attention over a store's segments through the Triton kernels.

What the kernels read as it lies in pages: uniform codes, tiers of them, levels of a book, norms, fp8 and fp4, of every
width, and keys relative to their block. What they do not (keys before RoPE, sparse outliers, low-rank factors) is
decoded a step at a time into fp16 pages that are thrown away after the layer, and attended to by the same kernels: two
passes. docs/kernels.md has the reasons.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

import kvq.cache.chunk as chunk
from kvq.cache.fused_pack import pages_of
from kvq.cache.snapshot import Snapshot, group_rows
from kvq.cache.store import HeadStore
from kvq.cache.turns import Turns, packed_origins, place_of
from kvq.kernels.decode_attention import decode_attention
from kvq.kernels.decode_attention.decode_plan import DecodePlan
from kvq.kernels.dispatch import LARGEST_QUERIES
from kvq.kernels.types import Exact, KeyFrame, Query
from kvq.kernels.unpack import unpack_pages
from kvq.pages.layout import SIDES, PageLayout, SideLayout
from kvq.pages.pages import Pages
from kvq.transforms.frame import Frame

# Tokens that are decoded at once for the two-pass form.
DENSE_TOKENS = 4096


class Steps:
    """Plans and counters of a cache's decode launches, shared by its layers; a copy starts without any."""

    def __init__(self):
        self._plans: dict[tuple, DecodePlan] = {}
        self._last: tuple[tuple, _Step] | None = None
        self.turns = Turns()
        self._told: tuple[tuple[int, ...], torch.Tensor] | None = None

    def counts(self, columns: tuple[int, ...], rows: int) -> torch.Tensor:
        """int32 [rows, columns], all rows alike; layers that are alike share it."""
        key = (rows, *columns)
        if self._told is None or self._told[0] != key:
            self._told = key, torch.tensor([columns] * rows, dtype=torch.int32)
        return self._told[1]

    def __reduce__(self):
        return Steps, ()

    def step(
        self, layout: PageLayout, counts: "_Counts", shape: tuple[int, int, int], device: torch.device, frame: int = 0
    ) -> "_Step":
        """The step of this forward; layers that are alike share it. shape: KV heads, group, query tokens; frame: tokens
        of a block of the keys' frame."""
        key = (layout, counts, shape, device, frame)
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        plan = self._plan((layout, len(counts.ends), *shape, device, frame))
        made = torch.tensor(counts.columns, dtype=torch.int32).to(device, non_blocking=True)
        step = _Step(
            plan=plan,
            lengths=made[0],
            exact=made[:4].T.contiguous(),
            positions=made[4],
            offsets={"key": made[5], "value": made[6]},
        )
        plan.update(step.lengths)
        self._last = (key, step)
        return step

    def _plan(self, key: tuple) -> DecodePlan:
        if key not in self._plans:
            # Plans of other batches are not needed any more; a cache has few layouts.
            self._plans = {old: plan for old, plan in self._plans.items() if old[1] == key[1]}
            layout, batch, heads, group, queries, device, frame = key
            settings = {"batch": batch, "heads": heads, "group": group, "queries": queries, "device": device}
            settings["frame"] = frame
            self._plans[key] = DecodePlan(layout, impl="triton", **settings)
        return self._plans[key]


@dataclass(frozen=True, kw_only=True)
class _Step:
    """lengths [B]: packed on both sides; exact [B, 4], see ``Exact.lengths``; positions [B]: of the first query.

    offsets   by side, [B]: where the exact tokens lie in their buffer.
    """

    plan: DecodePlan
    lengths: torch.Tensor
    exact: torch.Tensor
    positions: torch.Tensor
    offsets: dict[str, torch.Tensor]


@dataclass(frozen=True)
class _Counts:
    """By row: packed keys and values, body tokens that the queries may see, the first query's position, and where exact
    keys and values lie."""

    keys: tuple[int, ...]
    values: tuple[int, ...]
    ends: tuple[int, ...]
    positions: tuple[int, ...]
    key_offsets: tuple[int, ...]
    value_offsets: tuple[int, ...]

    @property
    def columns(self) -> list[tuple[int, ...]]:
        low = tuple(map(min, self.keys, self.values))
        return [low, self.keys, self.values, self.ends, self.positions, self.key_offsets, self.value_offsets]


def obstacle(snapshot: Snapshot, mask, valid, softcap: float | None) -> str | None:
    """What this forward has against the kernels, or None."""
    if valid is not None:
        return "pads among the new tokens"
    if mask is not None:
        return "a mask other than the causal one"
    if snapshot.spans is None:
        return "rows that read different states"
    longest = _longest(snapshot)
    if longest > LARGEST_QUERIES and softcap is not None:
        return f"{longest} query tokens at once, more than {LARGEST_QUERIES}, and a softcap"
    return None


def _longest(snapshot: Snapshot) -> int:
    """Most query tokens that read one state."""
    return max((stop - start for start, stop in snapshot.spans), default=0)


def attend(
    store: HeadStore, snapshot: Snapshot, q: torch.Tensor, options, steps: Steps, lse: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention of queries [B, kv_heads, group, L, head_dim], same shape out; ``obstacle`` must have found none.

    lse [B, kv_heads, group, L] gets the log-sum-exp, which the kernels write anyway; None if nobody asks.
    """
    if _longest(snapshot) > LARGEST_QUERIES:
        return chunk.attend(store, snapshot, q, options, lse)
    B, K, G, _, D = q.shape
    rows, sinks = snapshot.views, store.group.sinks
    two_passes = store.serving(q.dtype).two_passes is not None
    outputs = []
    for i, view in enumerate(rows[0]):
        ends = tuple(max(0, before + view.stop - sinks) for before in snapshot.before)
        packed = {side: tuple(min(row[i].packed[side], end) for row, end in zip(rows, ends)) for side in SIDES}
        pages = _dense_pages(store, packed) if two_passes else pages_of(store)
        positions = tuple(before + view.start for before in snapshot.before)
        counts = _Counts(packed["key"], packed["value"], ends, positions, *_offsets(snapshot, sinks))
        length = view.stop - view.start
        frame = None if two_passes else _key_frame(store, packed["key"], steps)
        step = steps.step(pages.layout, counts, (K, G, length), q.device, 0 if frame is None else frame.block)
        query = Query(
            q=q[:, :, :, view.start : view.stop].reshape(B, K * G, length, D),
            scale=options.scaling,
            positions=step.positions,
            softcap=options.softcap,
            sink_logits=options.sink_logits,
        )
        exact = _exact(store, snapshot, step)
        found = decode_attention(query, pages, step.lengths, step.plan, exact, frame=frame, impl="triton")
        outputs.append(found.out.view(B, K, G, length, D))
        if lse is not None:
            lse[:, :, :, view.start : view.stop] = found.lse.view(B, K, G, length)
    return torch.cat(outputs, dim=3) if len(outputs) > 1 else outputs[0]


def _key_frame(store: HeadStore, packed: tuple[int, ...], steps: Steps) -> KeyFrame | None:
    """Where the packed keys of all rows stand; None: where exact ones do."""
    frame = store.group.frame
    if not isinstance(frame, Frame):
        return None
    rows = list(range(len(packed)))

    def origins() -> torch.Tensor:
        found = packed_origins(store, rows, packed)
        # A launch wants an address even where no page is there yet.
        return found if found.shape[1] else found.new_zeros(len(packed), 1)

    return steps.turns.on_device(frame, origins, place_of(store, rows, packed), store.pool.device)


def _offsets(snapshot: Snapshot, sinks: int) -> list[tuple[int, ...]]:
    """Of both sides: what is added to a body token's number to find it; a row's last token is the buffer's last."""
    bodies = [max(0, before + added - sinks) for before, added in zip(snapshot.before, snapshot.added)]
    capacities = [snapshot.exact[side].shape[2] for side in SIDES]
    return [tuple((capacity - body) % capacity for body in bodies) for capacity in capacities]


def _exact(store: HeadStore, snapshot: Snapshot, step: _Step) -> Exact:
    mixed = store.group.rules["key"] != store.group.rules["value"]
    return Exact(
        lengths=step.exact,
        keys=snapshot.exact["key"],
        values=snapshot.exact["value"],
        key_offsets=step.offsets["key"],
        value_offsets=step.offsets["value"],
        sink_keys=store.sinks.get("key"),
        sink_values=store.sinks.get("value"),
        mixed_key=mixed,
        mixed_value=mixed,
    )


def _dense_pages(store: HeadStore, packed: dict[str, tuple[int, ...]]) -> Pages:
    """The packed tokens of every row in fp16 pages, keys as they are after the rotary embedding."""
    size, group = store.group.layout.page_tokens, store.group
    B, K, D = len(store.tables), store.heads, group.head_dim
    count = max(1, -(-max(max(packed[side]) for side in SIDES) // size))
    pool = torch.empty(B, count, K, len(SIDES), size, D, dtype=torch.float16, device=store.pool.device)
    no_unpack = store.serving(torch.float16).no_unpack
    for i, side in enumerate(SIDES):
        if no_unpack[side] is None and (side == "value" or group.frame is None):
            lengths = torch.tensor(packed[side], dtype=torch.int32).to(pool.device, non_blocking=True)
            unpack_pages(pages_of(store), side, lengths, pool[:, :, :, i].transpose(1, 2), impl="triton")
            continue
        for rows in group_rows(list(packed[side])):
            stop = packed[side][rows[0]]
            for start in range(0, stop, DENSE_TOKENS):
                numbers = chunk.unpacked(store, side, rows, start, min(stop, start + DENSE_TOKENS), torch.float16)
                tokens = -(-numbers.shape[2] // size) * size
                numbers = torch.nn.functional.pad(numbers, (0, 0, 0, tokens - numbers.shape[2]))
                numbers = numbers.unflatten(2, (-1, size)).transpose(1, 2)
                pool[rows, start // size : (start + tokens) // size, :, i] = numbers
    table = torch.arange(B * count, dtype=torch.int32, device=pool.device).view(B, count)
    return Pages.of(_dense_layout(D, size), pool.view(torch.uint8).view(B * count, K, -1), table)


@lru_cache(maxsize=16)
def _dense_layout(head_dim: int, page_tokens: int) -> PageLayout:
    side = SideLayout(format="dense", bits=16, head_dim=head_dim, page_tokens=page_tokens)
    return PageLayout(key=side, value=side)
