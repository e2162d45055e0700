"""Two-view attention: one forward in which every query reads what decoding would have read.

For query position p (p tokens before it) the first ``b(p)`` body tokens are read as the packed cache gives them back,
later ones exactly, with one softmax over both. The body starts after the sinks, and keys and values have their own b:

    stream     b(p) = seen(p)                                  every token is decoded one by one
    prefill    b(p) = 0 if p < context else seen(p)            the context is one exact prompt, the rest is decoded
    chunked    b(p) = seen(chunk * floor(p / chunk))           the text arrives in chunks of ``chunk`` tokens
    simulate   every number after the sinks is quantized, the query's own token included; no window (papers' tables)

This equals decoding because a stored token depends on its own block alone, and every layer's row p is computed from
what row p may see. Shapes: B rows, K KV heads, G query heads per KV head, T tokens, D head_dim.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from kvq.cache.attend import Options
from kvq.cache.plan import CachePlan, HeadGroup
from kvq.errors import DataError, suggest
from kvq.eval.branches import Branches
from kvq.kernels.decode_attention.exact_partial import exact_partial
from kvq.kernels.decode_attention.products import Partial, merge_partials
from kvq.pages.flush import FlushRule
from kvq.pages.layout import SIDES

MODES = ("stream", "prefill", "chunked", "simulate")
# Scores held at once: on a CPU they fit its cache, a GPU wants large products.
TILE_SCORES = {"cpu": 1 << 20, "gpu": 1 << 25}
# Query tiles of whole flush units leave no strip of keys that must be read both ways.
TILE_UNIT = 128


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How the tokens are taken to have arrived. ``contexts`` [B] int64: tokens of each row's prompt (prefill only)."""

    mode: str = "stream"
    chunk: int = 512
    contexts: torch.Tensor | None = None

    def __post_init__(self):
        if self.mode not in MODES:
            raise DataError(f"unknown mode {self.mode!r}.{suggest(str(self.mode), MODES)}")
        if isinstance(self.chunk, bool) or not isinstance(self.chunk, int) or self.chunk < 1:
            raise DataError(f"chunk={self.chunk!r} is not a number of tokens: use 1 or more.")
        if self.mode == "prefill" and self.contexts is None:
            raise DataError("mode 'prefill' needs the context length of every row: pass contexts=.")
        if self.mode != "prefill" and self.contexts is not None:
            raise DataError(f"contexts belong to mode 'prefill', not {self.mode!r}: leave them out.")

    @classmethod
    def check(cls, mode: str, chunk: int) -> None:
        """Raise DataError for an unknown mode, or a chunk that is no number of tokens."""
        cls(mode=mode, chunk=chunk, contexts=torch.zeros(1) if mode == "prefill" else None)

    def packed(self, rule: FlushRule, tokens: int) -> torch.Tensor:
        """b(p) of every query position, int64 [B or 1, tokens] on the CPU."""
        if self.mode == "simulate":
            return torch.full((1, tokens), tokens)
        position = torch.arange(tokens)
        if self.mode == "chunked":
            position = position // self.chunk * self.chunk
        found = _seen(rule, 1 << (tokens - 1).bit_length())[position].unsqueeze(0)
        if self.mode == "prefill":
            found = torch.where(position < self.contexts.unsqueeze(1), 0, found)
        return found


@lru_cache(maxsize=64)
def _seen(rule: FlushRule, tokens: int) -> torch.Tensor:
    return torch.tensor([rule.seen(position) for position in range(tokens)])


def reads_packed(
    plan: CachePlan, mode: str, length: int, *, chunk: int = 512, context: int | None = None
) -> torch.Tensor:
    """bool [length]: the query at this position reads at least one quantized token in some layer."""
    contexts = torch.tensor([context]) if mode == "prefill" else None
    schedule = Schedule(mode=mode, chunk=chunk, contexts=contexts)
    rules = {rule for groups in plan.layers.values() for group in groups for rule in group.rules.values()}
    reads = torch.zeros(length, dtype=torch.bool)
    for rule in rules:
        reads |= schedule.packed(rule, length)[0] > 0
    return reads


def can_share(plan: CachePlan, schedule: Schedule, context: int, longest: int) -> bool:
    """True if several branches of up to ``longest`` tokens of one context are stored as each would be alone.

    Where a scale spans tokens these are stored together, so all that a branch reads as stored must lie in the context.
    """
    for groups in plan.layers.values():
        for group in groups:
            for side in SIDES:
                # Blocks of a frame begin where they would with one branch alone.
                framed = side == "key" and group.frame is not None and group.frame.block > 1
                if group.codecs[side].block_tokens == 1 and not framed:
                    continue
                last = int(schedule.packed(group.rules[side], context + longest).max()) + group.sinks
                if schedule.mode == "simulate" or last > context:
                    return False
    return True


def two_view_attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    group: HeadGroup,
    schedule: Schedule,
    options: Options,
    mask: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    branches: Branches | None = None,
) -> torch.Tensor:
    """Causal attention of q [B, K, G, T, D] over exact keys and values [B, K, T, D] and their stored form; like q.

    mask        [B or 1, 1, T, T], bool (True = attend) or additive: hides further keys; causality is always applied.
    lengths     [B] real tokens a row, the rest of the row being pads on the right; None: all. Pads touch no scale.
    positions   [B or 1, T] rotary positions; None: 0, 1, 2, ... They matter for keys that are stored in a frame.
    branches    how the rows fork into several continuations of one context; None: they do not.

    Keys that all queries of a tile read alike need no scores of their own; the others' are held for a tile at a time.
    As in the packed cache, numbers are unpacked in float32, or in float64 for float64 models.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    B, K, G, T = q.shape[:4]
    keys, values = (group.chains[side].forward(x) for side, x in zip(SIDES, (keys, values)))
    q = group.chains["key"].transform_query(q.flatten(2, 3)).view(q.shape)
    if positions is None:
        positions = torch.arange(T).unsqueeze(0)
    sinks = group.sinks
    views = {}
    for side, exact in zip(SIDES, (keys, values)):
        bounds = schedule.packed(group.rules[side], T) + sinks
        bounds = (bounds if branches is None else branches.columns(bounds)).clamp(max=T)
        stored = _stored(exact, group, side, positions, bounds, schedule, lengths, dtype)
        views[side] = _Views(exact=exact.to(dtype), stored=stored, bounds=bounds)
    plain = mask is None and options.softcap is None
    on_cpu = q.device.type == "cpu"
    # A CPU holds no scores of keys that are read alike, and what remains is a strip of a few flush units.
    width = min(T, 3 * TILE_UNIT) if plain and on_cpu else T
    step = _tile(B * K * G, width, TILE_SCORES["cpu" if on_cpu else "gpu"])
    out = torch.empty_like(q)
    for start in range(0, T, step):
        stop = min(start + step, T)
        queries = q[:, :, :, start:stop].to(dtype) * options.scaling
        partials, first = _read_alike(views, queries, start, branches) if plain else ([], 0)
        scores = views["key"].scores(queries, start, first)
        if options.softcap is not None:
            scores = options.softcap * torch.tanh(scores / options.softcap)
        _hide(scores, mask, start, first)
        if branches is not None:
            branches.hide(scores, start, first)
        strip = views["value"].weighted_sum(torch.softmax(scores, dim=-1), start, first)
        partials.append((strip.flatten(2, 3), torch.logsumexp(scores, dim=-1).flatten(2, 3)))
        if options.sink_logits is not None:
            partials.append(_sink_logits(options.sink_logits, strip))
        out[:, :, :, start:stop] = merge_partials(partials).view_as(strip).to(q.dtype)
    return group.chains["value"].inverse(out.flatten(2, 3)).view(q.shape)


def _tile(rows: int, columns: int, budget: int) -> int:
    """Queries a tile: within the score budget, and a divisor or a multiple of the usual flush unit."""
    step = max(16, budget // (rows * columns))
    return step // TILE_UNIT * TILE_UNIT if step >= TILE_UNIT else 1 << step.bit_length() - 1


def _read_alike(views, q: torch.Tensor, start: int, branches: Branches | None) -> tuple[list[Partial], int]:
    """Attention of q [B, K, G, L, D] over the columns before ``start`` that all of it reads alike, both sides stored or
    both exactly, and the first column that is left over."""
    stop = start + q.shape[3]
    limit = start if branches is None or stop <= branches.fork else min(start, branches.fork)
    reached = [(int(own.min()), int(own.max())) for own in (view.bounds[:, start:stop] for view in views.values())]
    stored = min([limit, *(low for low, _ in reached)])
    # Exact columns follow at once only where no query reads anything beyond as stored.
    exact = limit if max(high for _, high in reached) <= stored else stored
    q = q.flatten(2, 3)
    key, value = views["key"], views["value"]
    partials = []
    if stored:
        partials.append(exact_partial(q, key.stored[:, :, :stored], value.stored[:, :, :stored]))
    if exact > stored:
        partials.append(exact_partial(q, key.exact[:, :, stored:exact], value.exact[:, :, stored:exact]))
    return partials, exact


def _sink_logits(logits: torch.Tensor, strip: torch.Tensor) -> Partial:
    """One more key a query head, with the given score and a value of zero; strip [B, K, G, L, D]."""
    B, K, G, L, _ = strip.shape
    lse = logits.to(strip.dtype).view(1, K, G, 1).expand(B, K, G, L)
    return torch.zeros_like(strip).flatten(2, 3), lse.flatten(2, 3)


def _hide(scores: torch.Tensor, mask: torch.Tensor | None, start: int, first: int) -> None:
    """Hide the future, and what ``mask`` hides, from queries at ``start``; scores [B, K, G, L, columns], in place."""
    # A finite number, so that a row that sees nothing (a pad) stays finite.
    lowest = torch.finfo(scores.dtype).min
    length, end = scores.shape[-2], first + scores.shape[-1]
    future = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
    if mask is not None:
        own = mask[:, :, start:end, first:end].unsqueeze(1)
        if own.dtype == torch.bool:
            scores.masked_fill_(~own, lowest)
        else:
            scores.add_(own.to(scores.dtype)).clamp_(min=lowest)
    scores[..., start - first :].masked_fill_(future, lowest)


@dataclass(frozen=True, kw_only=True)
class _Views:
    """One side: exact and stored numbers [B, K, T, D]; query p reads column j as stored if j < bounds[b, p]."""

    exact: torch.Tensor
    stored: torch.Tensor
    bounds: torch.Tensor

    def _strip(self, start: int, stop: int, first: int) -> tuple[int, int, torch.Tensor]:
        """Columns [low, high) from ``first`` on that not all queries of [start, stop) read alike, and who as stored."""
        bounds = self.bounds[:, start:stop].clamp(min=first, max=stop)
        low, high = int(bounds.min()), int(bounds.max())
        reads = torch.arange(low, high) < bounds.unsqueeze(-1)
        return low, high, reads[:, None, None].to(self.exact.device)

    def scores(self, q: torch.Tensor, start: int, first: int) -> torch.Tensor:
        """q [B, K, G, L, D] at ``start`` times every key from ``first`` to the last query: [B, K, G, L, columns]."""
        stop = start + q.shape[3]
        low, high, reads = self._strip(start, stop, first)
        parts = []
        if high > first:
            parts.append(_times(q, self.stored[:, :, first:high].transpose(-1, -2)))
        if stop > low:
            parts.append(_times(q, self.exact[:, :, low:stop].transpose(-1, -2)))
        if len(parts) == 1:
            return parts[0]
        if high > low:
            stored, exact = parts
            exact[..., : high - low] = torch.where(reads, stored[..., low - first :], exact[..., : high - low])
            parts[0] = stored[..., : low - first]
        return torch.cat(parts, dim=-1)

    def weighted_sum(self, weights: torch.Tensor, start: int, first: int) -> torch.Tensor:
        """Sum of the values from ``first`` on with weights [B, K, G, L, columns]: [B, K, G, L, D]."""
        stop = first + weights.shape[-1]
        low, high, reads = self._strip(start, stop, first)
        before, own, after = weights.split([low - first, high - low, stop - high], dim=-1)
        out = 0
        if high > low:
            after = torch.cat([own.masked_fill(reads, 0), after], dim=-1)
            before = torch.cat([before, own.masked_fill(~reads, 0)], dim=-1)
        if stop > low:
            out = _times(after, self.exact[:, :, low:stop])
        return out + _times(before, self.stored[:, :, first:high]) if high > first else out


def _times(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [B, K, G, L, n] @ b [B, K, n, m]: the query heads of a KV head share one product."""
    return (a.flatten(2, 3) @ b).unflatten(2, a.shape[2:4])


def _stored(
    x: torch.Tensor,
    group: HeadGroup,
    side: str,
    positions: torch.Tensor,
    bounds: torch.Tensor,
    schedule: Schedule,
    lengths: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """x [B, K, T, D] with the body tokens that some query reads as stored put through the codec.

    Encoding happens in the dtype of x and decoding in ``dtype``, as in the packed cache.
    """
    out, sinks, stop = x.to(dtype, copy=True), group.sinks, int(bounds.max())
    if stop <= sinks:
        return out
    if schedule.mode != "simulate":
        out[:, :, sinks:stop] = group.round_trip(side, x[:, :, sinks:stop], positions[:, sinks:stop], dtype)
        return out
    # A partial last block has its own scale: the last real token fills what is missing.
    B, K, T, D = x.shape
    block = group.codecs[side].block_tokens
    last = ((torch.full((B,), T) if lengths is None else lengths) - sinks).clamp(min=1) - 1
    index = sinks + torch.minimum(torch.arange(-(-(T - sinks) // block) * block), last.unsqueeze(1))
    filled = x.gather(2, index.to(x.device)[:, None, :, None].expand(-1, K, -1, D))
    own = positions.expand(B, -1).gather(1, index)
    out[:, :, sinks:] = group.round_trip(side, filled, own, dtype)[:, :, : T - sinks]
    return out
