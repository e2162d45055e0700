"""Attention over one head group's segments: sinks | packed pages | exact window, merged by log-sum-exp."""

from dataclasses import dataclass

import torch

import kvq.cache.fused as fused
from kvq.cache.snapshot import Snapshot, View, group_rows
from kvq.cache.store import HeadStore
from kvq.kernels.cpp import launch
from kvq.kernels.decode_attention.products import Partial, merge_partials, merged_lse, partial_attention
from kvq.pages.layout import SIDES

# Numbers unpacked at once, and scores held at once: a tile fits a core's cache, never the whole past.
TILE_NUMBERS = 1 << 21
TILE_SCORES = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a model adds to plain attention: logit softcap, and learned sinks (one extra logit a query head)."""

    scaling: float
    softcap: float | None = None
    sinks: torch.Tensor | None = None


def attend(
    store: HeadStore,
    snapshot: Snapshot,
    q: torch.Tensor,
    mask: list[torch.Tensor] | None,
    valid: torch.Tensor | None,
    options: Options,
    steps: "fused.Steps",
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of the update's queries q [B, kv_heads, group, L, head_dim], same shape out.

    mask   by row, [L, tokens of the row] (bool, True = attend, or additive), the caller having reduced its columns to
           real tokens; None if it says no more than causality.
    valid  [B, L] real query tokens, on the CPU, or None for all. Rows of pads come out as zeros.
    steps  what the launches of one forward share.
    lse    [B, kv_heads, group, L], minus infinity: gets the log-sum-exp of real queries; None if nobody asks.

    What ran is noted in ``store.ran``. Raises KernelError if a kernel is asked for that cannot serve.
    """
    if snapshot is store.step:
        if mask is None:
            out, found = snapshot.attend(q, options)
            if lse is not None:
                lse.copy_(found.view_as(lse))
            return out
        snapshot = store.snapshot_of_step()
    many = any(view.stop - view.start > 1 for views in snapshot.views for view in views)
    ran = store.serving(q.dtype).attending(fused.obstacle(snapshot, mask, valid), many)
    store.ran.add(ran)
    if ran.impl == "triton":
        return fused.attend(store, snapshot, q, options, steps, lse)
    return _attend_torch(store, snapshot, q, mask, valid, options, ran.impl == "cpp", lse)


def _attend_torch(store, snapshot, q, mask, valid, options, compiled: bool, lse) -> torch.Tensor:
    """Row group by row group, each segment on its own."""
    out = torch.zeros_like(q)
    keys = list(zip(snapshot.before, snapshot.added))
    if valid is not None:
        for b, (before, added) in enumerate(keys):
            real = valid[b].nonzero().squeeze(1).to(q.device)
            rows_mask = None if mask is None else mask[b][real].unsqueeze(0)
            if added:
                own = q[b : b + 1, :, :, real]
                part = None if lse is None else lse[b : b + 1, :, :, real]
                out[b : b + 1, :, :, real] = _attend_rows(
                    store, snapshot, [b], before, added, own, rows_mask, options, compiled, part
                )
                if lse is not None:
                    lse[b : b + 1, :, :, real] = part
        return out
    for rows in group_rows(keys):
        before, added = keys[rows[0]]
        everyone = len(rows) == len(keys)
        rows_mask = None if mask is None else torch.stack([mask[b] for b in rows])
        if everyone:
            return _attend_rows(store, snapshot, rows, before, added, q, rows_mask, options, compiled, lse)
        part = None if lse is None else lse[rows]
        out[rows] = _attend_rows(store, snapshot, rows, before, added, q[rows], rows_mask, options, compiled, part)
        if lse is not None:
            lse[rows] = part
    return out


def _attend_rows(store, snapshot, rows, before, added, q, mask, options: Options, compiled: bool, lse) -> torch.Tensor:
    """Rows of equal length. q [b, K, G, L, D], mask [b, L, tokens] or None; lse [b, K, G, L], filled, or None."""
    outputs = []
    for view in snapshot.views[rows[0]]:
        end = before + view.stop
        queries = q[:, :, :, view.start : view.stop]
        bias = _bias(mask, view, before, queries, end)
        if compiled:
            out, found = _attend_compiled(store, snapshot, rows, view, end, options, queries, bias)
        else:
            partials = _Segments(store, snapshot, rows, before + added, options, queries, bias).partials(view, end)
            out = merge_partials(partials).view(*queries.shape)
            found = None if lse is None else merged_lse(partials).view(queries.shape[:-1])
        outputs.append(out)
        if lse is not None:
            lse[:, :, :, view.start : view.stop] = found
    return torch.cat(outputs, dim=3).to(q.dtype) if len(outputs) > 1 else outputs[0].to(q.dtype)


def _attend_compiled(store, snapshot, rows, view: View, end: int, options: Options, q, bias) -> Partial:
    """One query per head and row; q [b, K, G, 1, D]. The output, of the same shape, and log-sum-exp [b, K, G, 1]."""
    queries = q.to(torch.float64 if q.dtype == torch.float64 else torch.float32) * options.scaling
    sinks = min(store.group.sinks, end)
    body, total = end - sinks, max(snapshot.before[rows[0]] + snapshot.added[rows[0]] - store.group.sinks, 0)
    everyone = len(rows) == len(store.tables)
    exact = [snapshot.exact[side] if everyone else snapshot.exact[side][rows] for side in SIDES]
    packed = [min(view.packed[side], body) for side in SIDES]
    # A row's last token is the last one of the exact tokens at hand.
    offsets = [(x.shape[2] - total) % x.shape[2] for x in exact]
    counts = torch.tensor([*packed, body, sinks, end - 1, *offsets], dtype=torch.int32).expand(len(rows), 7)
    return launch.decode_attention(
        queries,
        fused.pages_of(store, rows),
        counts.contiguous(),
        exact,
        [store.sinks[side] if everyone else store.sinks[side][rows] for side in SIDES] if sinks else None,
        softcap=options.softcap,
        learned=None if options.sinks is None else options.sinks.view(queries.shape[1:3]),
        bias=None if bias is None else bias.flatten(1),
    )


def _bias(mask, view: View, before: int, q: torch.Tensor, end: int) -> torch.Tensor | None:
    """Additive mask [b, 1, 1, l, end] of the view's queries, causality included; None if everything is visible."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    length = view.stop - view.start
    bias = None
    if length > 1:
        position = torch.arange(before + view.start, before + view.stop, device=q.device)
        future = torch.arange(end, device=q.device) > position.unsqueeze(1)
        bias = torch.zeros(1, length, end, dtype=dtype, device=q.device).masked_fill_(future, -torch.inf)
    if mask is not None:
        own = mask[:, view.start : view.stop, :end]
        own = (
            torch.zeros_like(own, dtype=dtype).masked_fill_(~own, -torch.inf)
            if own.dtype == torch.bool
            else own.to(dtype)
        )
        bias = own if bias is None else bias + own
    return None if bias is None else bias[:, None, None]


class _Segments:
    """The partial results of one row group's segments for one view."""

    def __init__(self, store: HeadStore, snapshot: Snapshot, rows, total: int, options: Options, q, bias):
        self.store, self.snapshot, self.rows, self.options, self.bias = store, snapshot, rows, options, bias
        self.sinks = min(store.group.sinks, total)
        self.body = max(0, total - store.group.sinks)
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        b, K, G, L, D = q.shape
        self.shape = (b, K, G, L)
        self.q = (q.to(dtype) * options.scaling).reshape(b, K, G * L, D)

    def partials(self, view: View, end: int) -> list[Partial]:
        """Segments over tokens [0, end): sinks, packed, packed on one side only, exact."""
        found = []
        visible = max(0, end - self.store.group.sinks)
        packed = {side: min(view.packed[side], visible) for side in SIDES}
        low, high = min(packed.values()), max(packed.values())
        if self.sinks:
            found.append(self._exact_sinks(min(self.sinks, end)))
        for start, stop in self._tiles(low):
            found.append(self._segment(start, stop, {"key", "value"}))
        if high > low:
            found.append(self._segment(low, high, {side for side in SIDES if packed[side] > low}))
        if visible > high:
            found.append(self._segment(high, visible, set()))
        if self.options.sinks is not None:
            found.append(self._learned_sinks())
        return found

    def _tiles(self, stop: int):
        """Whole-page spans of the packed tokens, sized to the unpacking budget."""
        b, K, G, L = self.shape
        size = self.store.group.layout.page_tokens
        tokens = min(TILE_NUMBERS // (b * K * self.q.shape[-1]), TILE_SCORES // (b * K * G * L))
        step = max(1, tokens // size) * size
        return [(start, min(start + step, stop)) for start in range(0, stop, step)]

    def _segment(self, start: int, stop: int, packed: set[str]) -> Partial:
        """Body tokens [start, stop); ``packed`` names the sides that are read from pages."""
        offset = self.store.group.sinks
        if "key" in packed:
            scores = self._packed_scores(start, stop)
        else:
            scores = self.q @ self._exact("key", start, stop).transpose(-1, -2)
        scores = self._finish(scores, offset + start, offset + stop)
        if "value" not in packed:
            return partial_attention(scores, lambda weights: weights @ self._exact("value", start, stop))
        pages, first = self.store.pages(self.rows, start, stop)
        pad = (start - first, -(stop - first) % pages.layout.page_tokens)
        codec = self.store.group.codecs["value"]
        return partial_attention(
            scores,
            lambda weights: codec.weighted_sum(
                pages, "value", torch.nn.functional.pad(weights, pad) if any(pad) else weights
            ),
        )

    def _packed_scores(self, start: int, stop: int) -> torch.Tensor:
        if self.store.group.rope is not None:
            keys = self.store.decoded("key", self.rows, start, stop, self.q.dtype)
            return self.q @ keys.transpose(-1, -2)
        pages, first = self.store.pages(self.rows, start, stop)
        return self.store.group.codecs["key"].scores(pages, "key", self.q)[..., start - first : stop - first]

    def _exact_sinks(self, count: int) -> Partial:
        keys, values = (self.store.sinks[side][self.rows][:, :, :count].to(self.q.dtype) for side in SIDES)
        scores = self._finish(self.q @ keys.transpose(-1, -2), 0, count)
        return partial_attention(scores, lambda weights: weights @ values)

    def _learned_sinks(self) -> Partial:
        b, K, G, L = self.shape
        logit = self.options.sinks.to(self.q.dtype).view(1, K, G, 1).expand(b, K, G, L).reshape(b, K, G * L)
        return torch.zeros_like(self.q), logit

    def _finish(self, scores: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Softcap and mask for tokens [start, stop)."""
        if self.options.softcap is not None:
            scores = self.options.softcap * torch.tanh(scores / self.options.softcap)
        if self.bias is None:
            return scores
        b, K, G, L = self.shape
        return (scores.view(b, K, G, L, -1) + self.bias[..., start:stop]).view_as(scores)

    def _exact(self, side: str, start: int, stop: int) -> torch.Tensor:
        exact = self.snapshot.exact[side]
        end = exact.shape[2]
        tokens = exact[:, :, end - (self.body - start) : end - (self.body - stop)]
        tokens = tokens if len(self.rows) == exact.shape[0] else tokens[self.rows]
        return tokens.to(self.q.dtype)
