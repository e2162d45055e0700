"""A decode step that needs nothing of the host: counters, exact tokens and page tables stay on the device.

A store enters this state with the first single token after a prompt, where the Triton kernels pack and attend
(``Serving.steps_on_device``), and leaves it (``HeadStore.settle``) for whatever else is asked of it: several tokens,
beams, a crop, offloading, reading what is stored. A step is one launch that packs what the rules release and stores the
new token, and three that attend. The host counts along, so it knows when a row needs another page; only then is a table
copied. Between two such steps every tensor keeps its address, results included: the next step overwrites them.
"""

import dataclasses

import torch

from kvq.cache.fused_pack import pages_of
from kvq.cache.plan import HeadGroup
from kvq.kernels.append import launch as append_launch
from kvq.kernels.append.decode_state import DecodeState, ExactStore
from kvq.kernels.decode_attention import launch as attention_launch
from kvq.kernels.decode_attention.decode_plan import DecodePlan
from kvq.kernels.types import Query
from kvq.pages.layout import SIDES, PageLayout

# Pages that a new table has room for beyond those that are there.
ROOM = 64


class StepCounters:
    """Counters of all stores of a cache that have the same rules and the same tokens; moved once a forward.

    start   tokens by row before the first step; steps: how many were made.
    """

    def __init__(self, group: HeadGroup, counts: tuple[int, ...], device: torch.device):
        self.start, self.steps, self.rules = counts, 0, group.rules
        rules = {side: dataclasses.replace(rule, sinks=0) for side, rule in group.rules.items()}
        self.state = DecodeState(batch=len(counts), sinks=group.sinks, device=device, impl="triton", **rules)
        self.state.start(torch.tensor(counts, dtype=torch.int32).to(device))
        self._plans: dict[tuple, DecodePlan] = {}
        self._pages: dict[int, tuple[int, tuple[int, ...], int]] = {}

    def advance(self) -> None:
        self.state.advance(1)
        self.steps += 1
        for plan in self._plans.values():
            plan.update(self.state.lengths)

    def plan(self, layout: PageLayout, heads: int, group: int) -> DecodePlan:
        """The plan of this step's attention; group: query heads of a KV head."""
        key = layout, heads, group
        if key not in self._plans:
            settings = {"batch": len(self.start), "heads": heads, "group": group, "device": self.state.device}
            self._plans[key] = DecodePlan(layout, impl="triton", **settings)
            self._plans[key].update(self.state.lengths)
        return self._plans[key]

    def before(self, steps: int) -> list[int]:
        """Tokens by row before step ``steps`` (1 for the first)."""
        return [count + steps - 1 for count in self.start]

    def pages(self, size: int, steps: int) -> tuple[tuple[int, ...], int]:
        """Pages of ``size`` tokens that each row needs in step ``steps``, and the first later step that needs more."""
        found = self._pages.get(size)
        if found is None or not found[0] <= steps < found[2]:
            now, later = self._needed(size, steps), steps + 1
            while self._needed(size, later) == now:
                later += 1
            found = self._pages[size] = steps, now, later
        return found[1], found[2]

    def _needed(self, size: int, steps: int) -> tuple[int, ...]:
        need = {n: -(-max(rule.packed(n) for rule in self.rules.values()) // size) for n in set(self.before(steps))}
        return tuple(need[n] for n in self.before(steps))


def counters_of(held: dict, group: HeadGroup, counts: list[int], device: torch.device) -> StepCounters:
    """Counters for a store that is to make its first step from ``counts`` tokens by row; ``held``: those of its cache,
    by rules and tokens."""
    key = group.sinks, *group.rules.values(), tuple(counts), device
    if key not in held or held[key].steps > 1:
        for old in [old for old, counters in held.items() if counters.steps > 1]:
            del held[old]
        held[key] = StepCounters(group, tuple(counts), device)
    return held[key]


class DeviceStep:
    """One store while single tokens arrive: its exact tokens in rings, and the launches of its steps."""

    def __init__(self, store, counters: StepCounters, tails: dict[str, torch.Tensor]):
        """``tails`` by side, right-aligned exact tokens [B, kv_heads, any, head_dim] that are not packed."""
        self.store, self.counters, self.steps = store, counters, 0
        state, group = counters.state, store.group
        heads, dtype = len(group.heads), tails["key"].dtype
        self.exact = ExactStore.empty(state, heads=heads, head_dim=group.head_dim, dtype=dtype)
        for side, ring, sinks in (
            ("key", self.exact.keys, self.exact.sink_keys),
            ("value", self.exact.values, self.exact.sink_values),
        ):
            _fill_ring(ring, tails[side], store.bodies())
            if side in store.sinks:
                sinks.copy_(store.sinks[side])
        self.views = {side: group.codecs[side].view(group.layout.page_tokens) for side in SIDES}
        self.chains = {side: chain.reusing() for side, chain in store.step_chains.items()}
        # How often launches were made anew.
        self.renewals = 0
        self.ran = store.serving(dtype).attending(None, False)
        self._forget()

    def _forget(self) -> None:
        """Launches hold addresses; they are made anew with the next step."""
        self.table: torch.Tensor | None = None
        self._grows_at = 0
        self._appends: dict = {}
        self._attends: dict = {}
        self._outs: dict[tuple, torch.Tensor] = {}

    def __getstate__(self) -> dict:
        # A copy's tensors lie elsewhere.
        fresh = {"table": None, "_grows_at": 0, "_appends": {}, "_attends": {}, "_outs": {}, "pages": None}
        return self.__dict__ | fresh

    @property
    def grows_next(self) -> bool:
        """Whether the next step takes pages, or makes its launches anew: the host must be there."""
        return self.steps + 1 >= self._grows_at

    def follow(self) -> None:
        """Count a step that the device has made by itself: a graph that was recorded of an earlier one."""
        if self.counters.steps == self.steps:
            self.counters.steps += 1
        self.steps += 1

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Pack what the rules release and store a token, keys and values [B, kv_heads, 1, head_dim]."""
        if self.counters.steps == self.steps:
            self.counters.advance()
        self.steps += 1
        assert self.counters.steps == self.steps, "stores that share counters make their steps together"
        if self.steps >= self._grows_at:
            self._grow()
        shape = keys.stride(), values.stride()
        if shape not in self._appends:
            self._appends[shape] = append_launch.append(
                keys, values, self.exact, self.pages, self.counters.state, self.views
            )
        self._appends[shape].run(keys, values)

    def _grow(self) -> None:
        """Take the pages that this step needs, and put them into the table, which keeps its place while it has room."""
        store, size = self.store, self.store.group.layout.page_tokens
        needed, self._grows_at = self.counters.pages(size, self.steps)
        store.ensure_pages(needed)
        found = pages_of(store)
        fresh = found.table
        if self.table is None or fresh.shape[1] > self.table.shape[1]:
            self.table = fresh.new_zeros(fresh.shape[0], fresh.shape[1] + ROOM)
        self.table[:, : fresh.shape[1]] = fresh
        self.pages = dataclasses.replace(found, numbers=self.table)
        self._appends, self._attends = {}, {}
        self.renewals += 1

    def attend(self, q: torch.Tensor, options) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of queries [B, kv_heads, group, 1, head_dim], same shape out, and log-sum-exp [B, heads, 1].

        The next step overwrites both.
        """
        self.store.ran.add(self.ran)
        B, K, G, _, D = q.shape
        q = q.reshape(B, K * G, 1, D)
        sinks = options.sink_logits
        key = q.shape, q.dtype, q.stride(), options.scaling, options.softcap, sinks is None
        if key not in self._attends:
            state = self.counters.state
            plan, out = self.counters.plan(self.pages.layout, K, G), self._out(q.shape, q.dtype)
            query = Query(
                q=q, scale=options.scaling, positions=state.positions, softcap=options.softcap, sink_logits=sinks
            )
            self._attends[key] = (
                plan,
                out,
                attention_launch.split(plan, self.pages, state.lengths, query, state.sinks),
                attention_launch.exact(plan, self.pages, query, self.exact.exact(state)),
                attention_launch.merge(plan, query, out, True),
            )
        plan, out, split, exact, merge = self._attends[key]
        split.run(q)
        exact.run(q)
        if torch.is_grad_enabled():
            # What a graph of gradients keeps must not be overwritten.
            out = out.new_empty(B, 1, K * G, D).transpose(1, 2)
        merge.run(out, *merge.args[1:4], *(() if sinks is None else (sinks,)))
        return out.view(B, K, G, 1, D), plan.lse.view(B, K * G, 1)

    def _out(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Memory for attention outputs [B, heads, 1, D]: as the model wants them, token by token, so that nothing is
        copied."""
        if (shape, dtype) not in self._outs:
            B, H, _, D = shape
            # A forward outside of inference mode may write there next.
            with torch.inference_mode(False):
                own = torch.empty(B, 1, H, D, dtype=dtype, device=self.counters.state.device)
            self._outs[shape, dtype] = own.transpose(1, 2)
        return self._outs[shape, dtype]

    def before(self) -> list[int]:
        """Tokens by row before the last step."""
        return self.counters.before(self.steps)

    def tails(self) -> dict[str, torch.Tensor]:
        """By side, the exact tokens that the last step's query reads, right-aligned [B, kv_heads, any, head_dim]."""
        before = self.before()
        bodies = [max(0, n + 1 - self.store.group.sinks) for n in before]
        rings = {"key": self.exact.keys, "value": self.exact.values}
        found = {}
        for side in SIDES:
            packed = [self.store.group.rules[side].packed(n) for n in before]
            longest = max(body - done for body, done in zip(bodies, packed))
            found[side] = _from_ring(rings[side], bodies, longest)
        return found

    def sinks(self) -> dict[str, torch.Tensor]:
        if not self.store.group.sinks:
            return {}
        return {"key": self.exact.sink_keys, "value": self.exact.sink_values}

    @property
    def nbytes(self) -> int:
        """Bytes of the rings; the sinks are the store's."""
        held = self.exact
        return held.keys.nbytes + held.values.nbytes


def _slots(bodies: list[int], longest: int, capacity: int, device: torch.device) -> torch.Tensor:
    """Where the last ``longest`` tokens of every row lie, [B, 1, longest, 1]; token t lies at ``t % capacity``."""
    first = torch.tensor(bodies).unsqueeze(1) - longest
    return ((first + torch.arange(longest)) % capacity)[:, None, :, None].to(device)


def _fill_ring(ring: torch.Tensor, tail: torch.Tensor, bodies: list[int]) -> None:
    longest = min(tail.shape[2], ring.shape[2])
    if longest:
        tail = tail[:, :, tail.shape[2] - longest :].to(ring.dtype)
        ring.scatter_(2, _slots(bodies, longest, ring.shape[2], ring.device).expand_as(tail), tail)


def _from_ring(ring: torch.Tensor, bodies: list[int], longest: int) -> torch.Tensor:
    index = _slots(bodies, longest, ring.shape[2], ring.device)
    return ring.gather(2, index.expand(-1, ring.shape[1], -1, ring.shape[3]))
