"""Attention over one head group's segments: sinks | packed pages | exact window, merged by log-sum-exp."""

from dataclasses import dataclass
from functools import partial

import torch

import kvq.cache.fused as fused
from kvq.cache.reading import decoded, pages_with
from kvq.cache.snapshot import Snapshot, TokenSnapshot, View, group_rows
from kvq.cache.store import HeadStore
from kvq.cache.turns import packed_origins, place_of
from kvq.kernels.cpp import launch
from kvq.kernels.cpp.launch import FrameNumbers
from kvq.kernels.decode_attention.products import Partial, merge_partials, merged_lse, partial_attention
from kvq.pages.layout import SIDES
from kvq.transforms.frame import Frame, merged

# Numbers unpacked at once, and scores held at once: a tile fits a core's cache, never the whole past.
TILE_NUMBERS = 1 << 21
TILE_SCORES = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a model adds to plain attention: logit softcap, and learned sink logits, one more a query head."""

    scaling: float
    softcap: float | None = None
    sink_logits: torch.Tensor | None = None


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

    mask   by sequence, [L, tokens that it has seen] (bool, True = attend, or additive), the caller having reduced its
           columns to real tokens; None if it says no more than causality.
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
    if isinstance(snapshot, TokenSnapshot) and mask is None and valid is None:
        return _attend_token(store, snapshot, q, options, steps, lse)
    if store.split > 1 and q.shape[1] > 1:
        return _attend_by_head(store, snapshot, q, mask, valid, options, steps, lse)
    if store.kept is not None and mask is not None:
        mask = _stored_columns(store, snapshot, mask)
    many = any(view.stop - view.start > 1 for views in snapshot.views for view in views)
    ran = store.serving(q.dtype).attending(fused.obstacle(snapshot, mask, valid, options.softcap), many)
    store.ran.add(ran)
    if ran.impl == "triton":
        return fused.attend(store, snapshot, q, options, steps, lse)
    return _attend_torch(store, snapshot, q, mask, valid, options, steps if ran.impl == "cpp" else None, lse)


def _stored_columns(store: HeadStore, snapshot: Snapshot, mask: list[torch.Tensor]) -> list[torch.Tensor]:
    """By row, the columns of the tokens that it has stored."""
    found = []
    for row, own in enumerate(mask):
        columns = torch.from_numpy(store.kept.seen(row, 0, snapshot.before[row] + snapshot.added[row]))
        found.append(own[:, columns.to(own.device)])
    return found


def _attend_by_head(store, snapshot, q, mask, valid, options: Options, steps, lse) -> torch.Tensor:
    """Every head of a sequence is a row of the store, so to all readers it is a sequence of one KV head."""
    B, K = q.shape[:2]
    mask = None if mask is None else [own for own in mask for _ in range(K)]
    valid = None if valid is None else valid.repeat_interleave(K, dim=0)
    if lse is None and options.sink_logits is not None:
        lse = q.new_full(q.shape[:-1], -torch.inf, dtype=_score_dtype(q))
    rows = None if lse is None else lse.view(B * K, 1, *lse.shape[2:])
    plain = Options(scaling=options.scaling, softcap=options.softcap)
    out = attend(store, snapshot, q.flatten(0, 1).unsqueeze(1), mask, valid, plain, steps, rows)
    out = out.squeeze(1).unflatten(0, (B, K))
    if options.sink_logits is None:
        return out
    # One more logit without a value.
    whole = torch.logaddexp(lse, options.sink_logits.to(lse.dtype).view(1, K, -1, 1))
    out = (out * (lse - whole).exp().unsqueeze(-1)).to(q.dtype)
    lse.copy_(whole.masked_fill(lse == -torch.inf, -torch.inf))
    return out


def _attend_torch(store, snapshot, q, mask, valid, options, steps: "fused.Steps | None", lse) -> torch.Tensor:
    """Row group by row group, each segment on its own; the C++ kernel, which runs where there are
    ``steps``, takes rows of any length together."""
    out = torch.zeros_like(q)
    keys = list(zip(snapshot.before, snapshot.added))
    if steps is not None and mask is None:
        keys = list(zip(map(len, snapshot.views), snapshot.added))
    if valid is not None:
        for b, (before, added) in enumerate(zip(snapshot.before, snapshot.added)):
            real = valid[b].nonzero().squeeze(1).to(q.device)
            rows_mask = None if mask is None else mask[b][real].unsqueeze(0)
            if added:
                own = q[b : b + 1, :, :, real]
                part = None if lse is None else lse[b : b + 1, :, :, real]
                out[b : b + 1, :, :, real] = _attend_rows(
                    store, snapshot, [b], before, added, own, rows_mask, options, steps, part
                )
                if lse is not None:
                    lse[b : b + 1, :, :, real] = part
        return out
    for rows in group_rows(keys):
        before, added = snapshot.before[rows[0]], snapshot.added[rows[0]]
        everyone = len(rows) == len(keys)
        rows_mask = None if mask is None else torch.stack([mask[b] for b in rows])
        if everyone:
            return _attend_rows(store, snapshot, rows, before, added, q, rows_mask, options, steps, lse)
        part = None if lse is None else lse[rows]
        out[rows] = _attend_rows(store, snapshot, rows, before, added, q[rows], rows_mask, options, steps, part)
        if lse is not None:
            lse[rows] = part
    return out


def _attend_rows(store, snapshot, rows, before, added, q, mask, options: Options, steps, lse) -> torch.Tensor:
    """Rows of equal length, or of any without a mask in the C++ kernel.

    q [b, K, G, L, D], mask [b, L, tokens] or None; lse [b, K, G, L], filled, or None.
    """
    outputs = []
    for i, view in enumerate(snapshot.views[rows[0]]):
        end = before + view.stop
        queries = q[:, :, :, view.start : view.stop]
        bias = _bias(mask, view, before, queries, end)
        if steps is not None:
            out, found = _attend_compiled(store, snapshot, rows, i, options, queries, bias, steps)
        else:
            partials = _Segments(store, snapshot, rows, before + added, options, queries, bias).partials(view, end)
            out = merge_partials(partials).view(*queries.shape)
            found = None if lse is None else merged_lse(partials).view(queries.shape[:-1])
        outputs.append(out)
        if lse is not None:
            lse[:, :, :, view.start : view.stop] = found
    return torch.cat(outputs, dim=3).to(q.dtype) if len(outputs) > 1 else outputs[0].to(q.dtype)


def _attend_compiled(store, snapshot, rows, index: int, options: Options, q, bias, steps) -> Partial:
    """One query per head and row, their views number ``index``; q [b, K, G, 1, D]. The output, of the same shape, and
    log-sum-exp [b, K, G, 1]."""
    queries = q.to(_score_dtype(q)) * options.scaling
    everyone = len(rows) == len(store.tables)
    exact = [snapshot.exact[side] if everyone else snapshot.exact[side][rows] for side in SIDES]
    counts = []
    for row in rows:
        view, before = snapshot.views[row][index], snapshot.before[row]
        end = before + view.stop
        sinks = min(store.group.sinks, end)
        total = max(before + snapshot.added[row] - store.group.sinks, 0)
        packed = [min(view.packed[side], end - sinks) for side in SIDES]
        # A row's last token is the last one of the exact tokens at hand.
        counts.append([*packed, end - sinks, sinks, end - 1, *((x.shape[2] - total) % x.shape[2] for x in exact)])
    return launch.decode_attention(
        queries,
        fused.pages_of(store, rows),
        store.serving(q.dtype).cpp_sides,
        torch.tensor(counts, dtype=torch.int32),
        exact,
        [store.sinks[side] if everyone else store.sinks[side][rows] for side in SIDES] if store.sinks else None,
        frame=_frame_numbers(store, rows, [own[0] for own in counts], queries, steps),
        softcap=options.softcap,
        sink_logits=None if options.sink_logits is None else options.sink_logits.view(queries.shape[1:3]),
        bias=None if bias is None else bias.flatten(1),
    )


def _attend_token(store, snapshot: TokenSnapshot, q, options: Options, steps, lse) -> torch.Tensor:
    """One token of each of several rows that are alike, in the C++ kernel; shapes as in ``attend``."""
    serving = store.serving(q.dtype)
    store.ran.add(serving.attending(None, False))
    queries, rows = q.to(_score_dtype(q)) * options.scaling, len(snapshot.before)
    out, found = launch.decode_attention(
        queries,
        fused.pages_of(store),
        serving.cpp_sides,
        steps.counts(snapshot.counts, rows),
        [snapshot.exact[side] for side in SIDES],
        [store.sinks[side] for side in SIDES] if store.sinks else None,
        frame=_frame_numbers(store, range(rows), [snapshot.counts[0]] * rows, queries, steps),
        softcap=options.softcap,
        sink_logits=None if options.sink_logits is None else options.sink_logits.view(queries.shape[1:3]),
    )
    if lse is not None:
        lse.copy_(found)
    return out.to(q.dtype)


def _frame_numbers(store, rows, packed: list[int], q: torch.Tensor, steps) -> FrameNumbers | None:
    """Where packed keys stand, for rows with so many of them and queries [b, K, G, L, D]; None: where exact ones do."""
    if store.group.frame is None or not any(packed):
        return None
    origins = partial(packed_origins, store, list(rows), packed)
    place = place_of(store, rows, packed)
    return steps.turns.of(store.group.frame, origins, place, q.shape[2] * q.shape[3], q.dtype)


def _bias(mask, view: View, before: int, q: torch.Tensor, end: int) -> torch.Tensor | None:
    """Additive mask [b, 1, 1, l, end] of the view's queries, causality included; None if everything is visible."""
    dtype = _score_dtype(q)
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


def _score_dtype(q: torch.Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


class _Segments:
    """The partial results of one row group's segments for one view."""

    def __init__(self, store: HeadStore, snapshot: Snapshot, rows, total: int, options: Options, q, bias):
        self.store, self.snapshot, self.rows, self.options, self.bias = store, snapshot, rows, options, bias
        self.sinks = min(store.group.sinks, total)
        self.body = max(0, total - store.group.sinks)
        dtype = _score_dtype(q)
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
        if self.options.sink_logits is not None:
            found.append(self._sink_logits())
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
        pages, first = pages_with(self.store, self.rows, start, stop)
        pad = (start - first, -(stop - first) % pages.layout.page_tokens)
        codec, frame = self.store.group.codecs["value"], self.store.group.value_frame

        def weighted_sum(weights: torch.Tensor) -> torch.Tensor:
            weights = torch.nn.functional.pad(weights, pad) if any(pad) else weights
            if frame is None or not frame.joint:
                return codec.weighted_sum(pages, "value", weights)
            return weights @ merged(codec.dequantized(pages, "value", weights.dtype))

        output, lse = partial_attention(scores, weighted_sum)
        return output if frame is None else frame.outputs(output), lse

    def _packed_scores(self, start: int, stop: int) -> torch.Tensor:
        frame = self.store.group.frame
        if isinstance(frame, Frame) and self.q.shape[2] < frame.block:
            return self._framed_scores(frame, start, stop)
        if frame is not None:
            keys = decoded(self.store, "key", self.rows, start, stop, self.q.dtype)
            return self.q @ keys.transpose(-1, -2)
        pages, first = pages_with(self.store, self.rows, start, stop)
        return self.store.group.codecs["key"].scores(pages, "key", self.q)[..., start - first : stop - first]

    def _framed_scores(self, frame: Frame, start: int, stop: int) -> torch.Tensor:
        """Few queries are turned for every block, instead of every key of it."""
        pages, first = pages_with(self.store, self.rows, start, stop)
        low = start // frame.block * frame.block
        keys = self.store.group.codecs["key"].dequantized(pages, "key", self.q.dtype)[:, :, low - first : stop - first]
        queries, bias = frame.queries(self.q, self.store.origins(self.rows, start, stop))
        missing = -keys.shape[2] % frame.block
        keys = torch.nn.functional.pad(keys, (0, 0, 0, missing)).unflatten(2, (-1, frame.block))
        keys = merged(keys) if frame.joint else keys
        scores = (queries.to(keys.dtype) @ keys.transpose(-1, -2) + bias.to(keys.dtype).unsqueeze(-1)).transpose(2, 3)
        return scores.flatten(3)[..., start - low : stop - low]

    def _exact_sinks(self, count: int) -> Partial:
        keys, values = (self.store.sinks[side][self.rows][:, :, :count].to(self.q.dtype) for side in SIDES)
        scores = self._finish(self.q @ keys.transpose(-1, -2), 0, count)
        return partial_attention(scores, lambda weights: weights @ values)

    def _sink_logits(self) -> Partial:
        b, K, G, L = self.shape
        logit = self.options.sink_logits.to(self.q.dtype).view(1, K, G, 1).expand(b, K, G, L).reshape(b, K, G * L)
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
