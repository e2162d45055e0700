"""One head group's cache: sinks | packed pages | exact window, for a batch of rows.

The packed state is a function of each row's real tokens alone: pads are dropped on arrival, a token is quantized once,
when its flush rule says so, and from the exact numbers.

A row is a sequence; where the group is stored *by head*, a KV head of a sequence, with a table, tokens and lengths of
its own. What a row has seen drives rules, positions and masks; what it has stored is less where tokens were dropped.
"""

from collections.abc import Sequence
from typing import Any

import torch

import kvq.cache.fused_pack as fused_pack
import kvq.cache.token_step as token_step
from kvq.cache.kept import Kept
from kvq.cache.page_tables import PageTables
from kvq.cache.plan import HeadGroup
from kvq.cache.positions import Positions
from kvq.cache.serving import Serving, serving_of
from kvq.cache.snapshot import Snapshot, View, group_rows
from kvq.cache.tail import Tail
from kvq.errors import CacheError
from kvq.kernels.cpp import launch
from kvq.kernels.dispatch import LARGEST_QUERIES, Choice
from kvq.pages.layout import SIDES
from kvq.pages.pages import Pages
from kvq.pages.pool import Pool

# Tokens that `crop` can take back while past recording is on; drafts are shorter than this.
RECORDED_TOKENS = 128


class HeadStore:
    """Keys and values of the KV heads of ``group``, for ``batch`` sequences.

    heads   KV heads of a row: those of the group, or one of them where it is stored by head; split: rows of a sequence.
    seen    by row, tokens that came; stored: those of them that are in sinks, pages and exact window.
    packed  by side and row, stored tokens that lie in pages.
    kept    which of the seen tokens are stored; None while all are.
    """

    def __init__(self, group: HeadGroup, batch: int, device: torch.device, dtype: torch.dtype | None = None):
        self.group = group
        self.split = len(group.heads) if group.by_head else 1
        self.heads = len(group.heads) // self.split
        rows = batch * self.split
        # The transforms where tokens of ``dtype`` are.
        self.chains = {side: chain.to(device, dtype) if dtype else chain for side, chain in group.chains.items()}
        place = len(group.heads), group.head_dim, device, dtype
        # The same while the device steps alone.
        self.step_chains = {side: chain.composed(*place) for side, chain in group.chains.items()} if dtype else None
        self.tables = PageTables(Pool(group.layout, self.heads, device), rows)
        self.seen = [0] * rows
        self.stored = [0] * rows
        self.kept: Kept | None = None
        self.packed = {side: [0] * rows for side in SIDES}
        self.sinks: dict[str, torch.Tensor] = {}
        self.tails = {side: Tail(rows) for side in SIDES}
        # Those of the sequences: heads of one differ in what they store, and not in where it stood.
        self.positions = Positions(batch) if group.frame else None
        self.recording = False
        # While whoever drops tokens has not decided: nothing is packed.
        self.holding = False
        # What attended so far and why, for reports.
        self.ran: set[Choice] = set()
        # What is asked for: a name of ``kvq.kernels.dispatch.IMPLEMENTATIONS``.
        self.impl = "auto"
        self._serving: dict[tuple, Serving] = {}
        # All rows' pages as kernels took them last (``fused_pack.pages_of``).
        self.all_pages: Pages | None = None
        # While single tokens arrive that the device handles alone: a ``DeviceStep``; counts and tails
        # are those from before it.
        self.step: Any = None

    @property
    def pool(self) -> Pool:
        """Where the pages lie."""
        return self.tables.pool

    def chains_of(self, tokens: int, dtype: torch.dtype) -> dict:
        """By side, the transforms of so many tokens of every row: one product each where they are few."""
        few = tokens <= LARGEST_QUERIES and self.step_chains is not None and self.serving(dtype).composes
        return self.step_chains if few else self.chains

    def append_on_device(self, new: dict[str, torch.Tensor], counters: dict) -> Any:
        """Transform and store one token a row, {side: [B, kv_heads, 1, head_dim]}, by the device's own counters.

        ``counters``: those of the cache (``ForwardContext.counters``). Returns the ``DeviceStep``, None where
        that is not served.
        """
        if self.step is None and not self._start_step(new["key"].dtype, counters):
            return None
        self.step.append(*(self.step.chains[side].forward(new[side]) for side in SIDES))
        return self.step

    def _start_step(self, dtype: torch.dtype, counters: dict) -> bool:
        if self.recording or self.holding or self.split > 1 or self.kept is not None:
            return False
        if not self.serving(dtype).steps_on_device:
            return False
        packed = {side: [self.group.rules[side].packed(n) for n in self.seen] for side in SIDES}
        if self.packed != packed:
            return False
        # Triton is imported where it runs.
        from kvq.cache.device_step import DeviceStep, counters_of

        tails = {side: self.tails[side].newest() for side in SIDES}
        self.step = DeviceStep(self, counters_of(counters, self.group, self.seen, self.pool.device), tails)
        self.tails, self.sinks = {side: Tail(len(self.seen)) for side in SIDES}, self.step.sinks()
        return True

    def settle(self) -> None:
        """Take back what the device has counted, so that anything may be asked of the store."""
        if self.step is None:
            return
        step, self.step = self.step, None
        before, exact = step.before(), step.tails()
        self.seen = [n + 1 for n in before]
        self.stored = list(self.seen)
        for side in SIDES:
            self.packed[side] = [self.group.rules[side].packed(n) for n in before]
            lengths = [body - done for body, done in zip(self.bodies(), self.packed[side])]
            self.tails[side] = Tail.of(exact[side], lengths)
            self._flush(side, exact[side])

    def snapshot_of_step(self) -> Snapshot:
        """The last step as ``append`` would have told it."""
        before = self.step.before()
        added = [1] * len(before)
        views = [self.views(row, n, 1) for row, n in enumerate(before)]
        return Snapshot(before=before, added=added, exact=self.step.tails(), views=views)

    def bodies(self) -> list[int]:
        """Stored tokens by row, sinks not counted."""
        return [max(0, n - self.group.sinks) for n in self.stored]

    def append(
        self,
        new: dict[str, torch.Tensor],
        valid: torch.Tensor | None,
        prompt: int | None = None,
        positions: torch.Tensor | None = None,
    ) -> Snapshot:
        """Store new tokens, {side: [B, kv_heads, L, head_dim]}, and pack what the rules say. ``valid`` [B, L], on the
        CPU, or None.

        ``positions`` [B or 1, L]: rotary positions; None: every row counts its own tokens. They matter only where keys
        are stored in a frame. Returns the exact tokens as they were before packing: KIVI packs after
        the step's attention.
        """
        self.settle()
        length = new["key"].shape[2]
        if length == 1 and valid is None and token_step.serves(self, new["key"].dtype):
            return token_step.append(self, new, positions)
        if self.positions is not None:
            own = _counted(self.seen[:: self.split], length, valid) if positions is None else positions
            self.positions.extend(own, valid)
        if self.split > 1:
            new = {side: x.flatten(0, 1).unsqueeze(1) for side, x in new.items()}
            valid = None if valid is None else valid.repeat_interleave(self.split, dim=0)
        before = self.seen
        added = [length] * len(before) if valid is None else valid.sum(1).tolist()
        self.seen = [n + a for n, a in zip(before, added)]
        self.stored = [n + a for n, a in zip(self.stored, added)]
        exact = {}
        for side in SIDES:
            exact[side] = self.tails[side].extend(new[side], valid)
            self._fill_sinks(side, exact[side], before)
            self._flush(side, exact[side])
        # Rows that are alike share their views.
        keys = range(len(before)) if self.holding or self.kept is not None else list(zip(before, added))
        views: dict = {}
        for row, key in enumerate(keys):
            if key not in views:
                views[key] = self.views(row, before[row], added[row], prompt)
        stored = [n - a for n, a in zip(self.stored, added)]
        return Snapshot(before=stored, added=added, exact=exact, views=[views[key] for key in keys], prompt=prompt)

    def serving(self, dtype: torch.dtype) -> Serving:
        """What packs and attends for tokens of a dtype, where the pages are."""
        key = dtype, self.impl, self.pool.device
        if key not in self._serving:
            self._serving[key] = serving_of(self.group, self.pool.device, dtype, self.impl)
        return self._serving[key]

    def _fill_sinks(self, side: str, exact: torch.Tensor, before: list[int]) -> None:
        sinks = self.group.sinks
        if not sinks or min(before) >= sinks:
            return
        if side not in self.sinks:
            B, K, _, D = exact.shape
            self.sinks[side] = exact.new_zeros(B, K, sinks, D)
        for b, held in enumerate(before):
            fresh = min(sinks, self.seen[b]) - held
            if fresh > 0:
                start = exact.shape[2] - (self.seen[b] - held)
                self.sinks[side][b, :, held : held + fresh] = exact[b, :, start : start + fresh]
        # Sinks never reach the tail's body: their share of the tail is skipped by the lengths set below.
        self.tails[side].lengths = [
            min(length, max(0, self.stored[b] - sinks)) for b, length in enumerate(self.tails[side].lengths)
        ]

    def _flush(self, side: str, exact: torch.Tensor) -> None:
        """Pack every body token that the rule releases, then shorten the exact window."""
        if self.holding:
            return
        rule, done = self.group.rules[side], self.packed[side]
        if self.kept is not None:
            targets = [self._released(side, row, count) for row, count in enumerate(self.seen)]
        else:
            targets = [rule.packed(count) for count in self.seen]
        for rows in group_rows(list(zip(done, targets, self.stored))):
            start, stop, count = done[rows[0]], targets[rows[0]], self.stored[rows[0]]
            if stop > start:
                body = count - self.group.sinks
                first = exact.shape[2] - (body - start)
                tokens = exact[:, :, first : first + stop - start]
                self._pack(side, rows, start, tokens if len(rows) == exact.shape[0] else tokens[rows])
        self.packed[side] = [max(target, old) for target, old in zip(targets, done)]
        recorded = rule.longest_tail + RECORDED_TOKENS if self.recording else 0
        keep = [
            min(length, max(self._body(b) - self.packed[side][b], recorded))
            for b, length in enumerate(self.tails[side].lengths)
        ]
        self.tails[side].keep(keep)

    def _released(self, side: str, row: int, seen: int) -> int:
        """Stored body tokens of a row that its rule has released after ``seen`` tokens, whole blocks of them: what a
        block lacks because tokens were dropped comes with later ones."""
        released = self.group.rules[side].packed(seen)
        if self.kept is None or not released:
            return released
        stored = self.kept.stored(row, self.group.sinks + released) - self.group.sinks
        block = self.group.codecs[side].block_tokens
        return stored // block * block

    def _body(self, row: int) -> int:
        return max(0, self.stored[row] - self.group.sinks)

    def hold(self) -> None:
        """Pack nothing until ``release``: tokens that may be dropped stay exact, a prompt's as they were lent."""
        self.settle()
        self.holding = True

    def release(self) -> None:
        """Go on packing what the rules release."""
        self.holding = False
        for side in SIDES:
            if self.tails[side].longest:
                self._flush(side, self.tails[side].newest())

    def _pack(self, side: str, rows: list[int], start: int, tokens: torch.Tensor) -> None:
        """Encode tokens [len(rows), kv_heads, t, head_dim] of the body from ``start`` and write them to pages."""
        size = self.group.layout.page_tokens
        stop = start + tokens.shape[2]
        if side == "key" and self.group.frame is not None:
            tokens = self.group.frame.enter(tokens, self.origins_by_token(rows, start, stop))
        elif side == "value" and self.group.value_frame is not None:
            tokens = self.group.value_frame.enter(tokens)
        self.tables.grow(rows, -(-stop // size))
        serving = self.serving(tokens.dtype)
        if serving.no_pack[side] is None:
            fused_pack.pack(self, side, rows, start, tokens)
            return
        compiled = serving.cpp_packs[side]
        if compiled is not None and launch.pack(tokens, fused_pack.pages_of(self, rows), compiled, start):
            return
        encoded = self.group.codecs[side].encode(tokens)
        Pages(pool=self.pool, ids=[self.tables.rows[row] for row in rows]).write(side, start, encoded)

    def origins(self, rows: list[int], start: int, stop: int) -> torch.Tensor:
        """Where the first token of every block of the frame that stored body tokens [start, stop) lie in stood when it
        came: rotary positions, int64 [rows, blocks]."""
        block = self.group.frame.block
        start, stop = self.group.sinks + start // block * block, self.group.sinks + stop
        sequences = rows if self.split == 1 else [row // self.split for row in rows]
        if self.kept is None:
            return self.positions.of(sequences, start, stop, block)
        every = [self.positions.of([b], 0, self.seen[row])[0] for b, row in zip(sequences, rows)]
        return torch.stack([own[self.kept.seen(row, start, stop)[::block]] for own, row in zip(every, rows)])

    def origins_by_token(self, rows: list[int], start: int, stop: int) -> torch.Tensor:
        """Origins by token, [rows, stop - start]."""
        block = self.group.frame.block
        skipped = start % block
        return self.origins(rows, start, stop).repeat_interleave(block, dim=1)[:, skipped : skipped + stop - start]

    def ensure_pages(self, needed: Sequence[int]) -> None:
        """Take pages until every row has as many as ``needed`` says."""
        for count in set(needed):
            self.tables.grow([row for row, own in enumerate(needed) if own == count], count)

    def views(self, row: int, before: int, added: int, prompt: int | None = None) -> list[View]:
        """What the ``added`` queries of a row after ``before`` seen tokens read.

        One view for all of them (a prompt chunk sees its own tokens exactly and the stored state of the chunks before
        it). While past recording is on, a draft is verified as if its tokens came one by one: one view a query, after
        the first ``prompt`` of them, which are a chunk. None: no draft follows a first update, and later ones are a
        draft.
        """
        chunk = added
        if self.recording:
            chunk = (0 if before else added) if prompt is None else min(added, prompt)
        found, start, rules = [], 0, self.group.rules
        while start < added:
            state, stop = before + start, max(chunk, start + 1)
            if self.kept is not None:
                packed = {side: self._released(side, row, state) for side in SIDES}
            else:
                packed = {side: rules[side].seen(state) for side in SIDES}
            if self.holding:
                packed = {side: min(n, self.packed[side][row]) for side, n in packed.items()}
            found.append(View(start=start, stop=stop, packed=packed))
            start = stop
        return found

    def crop(self, counts: list[int]) -> None:
        """Forget the newest ``counts[b]`` tokens of every sequence. Raises CacheError if they are no longer exact."""
        self.settle()
        counts = [count for count in counts for _ in range(self.split)]
        seen = [n - count for n, count in zip(self.seen, counts, strict=True)]
        if self.kept is not None and any(self.kept.dropped_after(row, n) for row, n in enumerate(seen)):
            raise CacheError(f"cannot remove {max(counts)} tokens: some of them were dropped already; remove fewer.")
        for side in SIDES:
            for b, held in enumerate(self.tails[side].lengths):
                body = max(0, self.stored[b] - counts[b] - self.group.sinks)
                if body and held - counts[b] < body - self._released(side, b, seen[b]):
                    raise CacheError(
                        f"cannot remove {counts[b]} tokens: some tokens before them are quantized for good and cannot "
                        "become exact again; call activate_past_recording() on the cache before the tokens arrive, and "
                        f"remove at most {RECORDED_TOKENS} at a time."
                    )
        self.seen, self.stored = seen, [n - count for n, count in zip(self.stored, counts)]
        if self.positions is not None:
            self.positions.crop(counts[:: self.split])
        for side in SIDES:
            self.tails[side].crop(counts)
            self.packed[side] = [min(p, self._released(side, b, seen[b])) for b, p in enumerate(self.packed[side])]
        self.tables.own_from(range(len(seen)), self._closed_pages())

    def _closed_pages(self, margin: int = 0) -> list[int]:
        """By row, how many first pages it does not write to any more, but for the newest ``margin`` packed tokens."""
        packed = [min(self.packed[side][row] for side in SIDES) for row in range(len(self.seen))]
        return [max(0, tokens - margin) // self.group.layout.page_tokens for tokens in packed]

    def select(self, index: torch.Tensor) -> None:
        """Take sequences by index (beams, batch changes). Pages that are still being filled are copied, full ones
        shared."""
        self.settle()
        if self.positions is not None:
            self.positions.select(index.tolist())
        if self.split > 1:
            index = (index.unsqueeze(1) * self.split + torch.arange(self.split, device=index.device)).flatten()
        order = index.tolist()
        self.tables.select(order)
        self.seen, self.stored = [self.seen[b] for b in order], [self.stored[b] for b in order]
        if self.kept is not None:
            self.kept.select(order)
        self.packed = {side: [self.packed[side][b] for b in order] for side in SIDES}
        # Rows that keep their place come last, so that they keep their open pages too. With past recording on, a crop
        # may reach back into the newest pages.
        margin = RECORDED_TOKENS if self.recording else 0
        self.tables.own_from(sorted(range(len(order)), key=lambda row: order[row] == row), self._closed_pages(margin))
        for side in SIDES:
            self.tails[side].select(index)
            if side in self.sinks:
                self.sinks[side] = self.sinks[side].index_select(0, index.to(self.sinks[side].device))

    @property
    def nbytes(self) -> int:
        """Every byte held: pages (free ones included), sinks and exact windows."""
        exact = sum(tail.nbytes for tail in self.tails.values()) + sum(s.nbytes for s in self.sinks.values())
        exact += 0 if self.step is None else self.step.nbytes
        exact += 0 if self.kept is None else self.kept.nbytes
        return self.pool.nbytes + exact

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_serving": {}, "all_pages": None}

    def to(self, device: torch.device) -> None:
        self.settle()
        self.pool.to(device)
        self.tables.forget_numbers()
        for tail in self.tails.values():
            tail.to(device)
        self.sinks = {side: s.to(device) for side, s in self.sinks.items()}


def _counted(before: list[int], length: int, valid: torch.Tensor | None) -> torch.Tensor:
    """Positions [B, length] of new tokens if every row counts its real tokens."""
    start = torch.tensor(before).unsqueeze(1)
    if valid is None:
        return start + torch.arange(length)
    return start + (valid.cpu().long().cumsum(1) - 1).clamp(min=0)
