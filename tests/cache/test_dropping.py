"""Tokens that a policy drops by head: what is read is a softmax over exactly those that stay, as they are stored.

The policy acts through what a layer offers (``observers``, ``hold``, ``drop``, ``release``); the reference sees keys,
values and the kept sets, encodes the survivors anew, and knows nothing of pages, tables or windows.
"""

import dataclasses

import pytest
import torch

from kvq.cache import model_attention
from kvq.cache.context import ForwardContext
from kvq.cache.layer import PackedLayer
from kvq.cache.plan import make_plan
from kvq.calib.artefacts import stand_in_artefacts
from kvq.errors import CacheError, RecipeError
from kvq.kernels.cpp import build
from kvq.kernels.dispatch import why_no_triton
from kvq.models.describe import describe
from kvq.pages.layout import SIDES
from kvq.recipe import load_recipe
from kvq.transforms.frame import block_origins

KV_HEADS, GROUP, HEAD_DIM, BATCH, PADS = 2, 2, 32, 2, 4
SCALING = 0.3
PROMPT, LATER = 150, (1, 1, 3, 1, 16, 16, 1)
RECIPES = {
    "tokens": ("int4", {"tokens.sinks": 3, "tokens.window": 5}),
    "blocks of keys": ("kivi2", {"tokens.window": 32, "key.group": 16}),
    "sinks and blocks": ("kivi4", {"tokens.window": 32, "tokens.sinks": 2}),
    "keys before RoPE": ("kivi4", {"key.placement": "pre_rope", "tokens.window": 32}),
}
MODELS = {"plain": {}, "softcap": {"softcap": 2.0}, "sink logits": {"s_aux": torch.tensor([0.5, -1.0, 3.0, 1.5])}}
TRITON = why_no_triton(torch.device("cpu"))
CPP = build.unavailable()


def make_layer(tiny_config, name="tokens", impl="reference", by_head=True, settings=None) -> PackedLayer:
    recipe, own = RECIPES[name]
    spec = describe(tiny_config(layers=1, heads=KV_HEADS * GROUP, kv_heads=KV_HEADS, head_dim=HEAD_DIM))
    recipe = load_recipe(recipe).override(own | (settings or {}))
    groups = make_plan(recipe, spec, stand_in_artefacts(recipe, spec)).layers[0]
    groups = tuple(dataclasses.replace(group, by_head=by_head) for group in groups)
    return PackedLayer(groups, ForwardContext(impl))


class Evictor:
    """At the end of a prompt every head keeps its sinks, its newest tokens and the most attended half of the others."""

    def __init__(self, protected: int, share: float = 0.5, alike: bool = False):
        self.protected, self.share, self.alike = protected, share, alike
        self.gone: torch.Tensor | None = None

    def after_attention(self, layer: PackedLayer, queries: torch.Tensor, lse: torch.Tensor) -> None:
        if self.gone is not None:
            return
        keys = layer.keys.repeat_interleave(GROUP, 1).to(queries)
        received = (queries @ keys.transpose(-1, -2) * SCALING - lse.unsqueeze(-1)).exp().nan_to_num(0)
        received = received.sum(2).unflatten(1, (KV_HEADS, GROUP)).sum(2)
        if self.alike:
            received = received.sum(1, keepdim=True).expand(-1, KV_HEADS, -1).clone()
        real = torch.ones(BATCH, keys.shape[2], dtype=torch.bool) if layer.real is None else layer.real
        self.gone = torch.ones_like(received, dtype=torch.bool)
        for b in range(BATCH):
            columns = real[b].nonzero().squeeze(1)
            body = columns[layer.groups[0].sinks : len(columns) - self.protected]
            for k in range(KV_HEADS):
                self.gone[b, k] = False
                # Heads keep different numbers of tokens, too.
                keep = int(self.share * len(body)) + 7 * k * (not self.alike)
                least = received[b, k, body].argsort()[: max(0, len(body) - keep)]
                self.gone[b, k, body[least]] = True
        layer.drop(self.gone)
        layer.release()


class Reference:
    """Keys and values as they came, by sequence, and what of them is kept, by head."""

    def __init__(self, group):
        self.group = group
        self.tokens = [{side: torch.zeros(KV_HEADS, 0, HEAD_DIM) for side in SIDES} for _ in range(BATCH)]
        self.kept = [torch.ones(KV_HEADS, 0, dtype=torch.bool) for _ in range(BATCH)]

    def extend(self, keys, values, real):
        for b, held in enumerate(self.tokens):
            own = real[b, -keys.shape[2] :]
            for side, x in (("key", keys), ("value", values)):
                held[side] = torch.cat([held[side].to(x), x[b][:, own]], dim=1)
            more = torch.ones(KV_HEADS, int(own.sum()), dtype=torch.bool)
            self.kept[b] = torch.cat([self.kept[b], more], dim=1)

    def seen_by(self, side: str, b: int, k: int, before: int, end: int, positions=None) -> torch.Tensor:
        """What a query after ``before`` tokens reads of the first ``end``: survivors, the released ones rounded."""
        kept, x = self.kept[b][k, :end], self.tokens[b][side][k, :end]
        sinks, codec = self.group.sinks, self.group.codecs[side]
        released = sinks + self.group.rules[side].packed(before)
        count = int(kept[sinks:released].sum()) // codec.block_tokens * codec.block_tokens
        x, where = x[kept].clone(), (torch.arange(end) if positions is None else positions)[kept]
        packed = x[sinks : sinks + count][None, None]
        where = where[None, sinks : sinks + count]
        origins = block_origins(where, self.group.frame.block) if self.group.frame else where
        if count and side == "key" and self.group.frame is not None:
            packed = self.group.frame.enter(packed, origins)
        if count:
            packed = codec.decode(codec.encode(packed), torch.float64)
        if count and side == "key" and self.group.frame is not None:
            packed = self.group.frame.leave(packed, origins)
        x = x.double()
        x[sinks : sinks + count] = packed[0, 0]
        return x

    def attention(self, query, before: int, b: int, model, stepwise=False, visible=None):
        """Query [H, L, D] of the newest tokens of sequence b, over what it keeps."""
        out = torch.zeros(query.shape, dtype=torch.float64)
        total = self.kept[b].shape[1]
        for h in range(KV_HEADS * GROUP):
            k = h // GROUP
            for i in range(query.shape[1]):
                state = before + i if stepwise else before
                keys, values = (self.seen_by(side, b, k, state, total) for side in SIDES)
                seen = torch.arange(total) <= before + i
                if visible is not None:
                    seen = seen & visible[i]
                seen = seen[self.kept[b][k]]
                scores = keys @ query[h, i].double() * SCALING
                if "softcap" in model:
                    scores = model["softcap"] * torch.tanh(scores / model["softcap"])
                scores = scores.masked_fill(~seen, -torch.inf)
                if "s_aux" in model:
                    scores = torch.cat([scores, model["s_aux"][h : h + 1].double()])
                out[h, i] = scores.softmax(0)[: len(keys)] @ values
        return out


class Run:
    """A layer and its reference, driven with the same numbers."""

    def __init__(self, layer: PackedLayer, model=None, dtype=torch.float64, pads=PADS):
        self.layer, self.model, self.dtype = layer, model or {}, dtype
        self.reference = Reference(layer.groups[0])
        self.real = torch.ones(BATCH, 0, dtype=torch.bool)
        self.pads, self.generator = pads, torch.Generator().manual_seed(3)

    def numbers(self, new: int):
        for heads in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS):
            yield torch.randn(BATCH, heads, new, HEAD_DIM, generator=self.generator).to(self.dtype)

    def forward(self, new: int, window: int | None = None) -> torch.Tensor:
        """New tokens through kvq's attention; [B, H, new, D]."""
        start = self.real.shape[1]
        more = torch.ones(BATCH, new, dtype=torch.bool)
        if start == 0 and self.pads:
            more[0, : self.pads] = False
        self.real = torch.cat([self.real, more], dim=1)
        self.query, keys, values = self.numbers(new)
        self.reference.extend(keys, values, self.real)
        position = torch.arange(start, start + new).unsqueeze(1)
        mask = (torch.arange(start + new) <= position) & self.real[:, None, None]
        if window:
            mask &= torch.arange(start + new) > position - window
        self.mask = mask
        self.layer.context.begin(self.real if self.pads else None)
        found, values = self.layer.update(keys, values)
        module = torch.nn.Module()
        module.num_key_value_groups = GROUP
        given = mask if self.pads or window else None
        out, _ = model_attention.kvq_attention(module, self.query, found, values, given, scaling=SCALING, **self.model)
        return out.transpose(1, 2)

    def prompt(self, evictor: Evictor | None) -> None:
        if evictor is not None:
            self.layer.observers.append(evictor)
            self.layer.hold()
        self.forward(PROMPT)
        if evictor is not None:
            for b, real in enumerate(self.real):
                self.reference.kept[b] &= ~evictor.gone[b][:, real]

    def error(self, out: torch.Tensor, stepwise=False, reference: Reference | None = None) -> float:
        """The largest difference from the reference, of the newest queries."""
        worst, new = 0.0, out.shape[2]
        for b in range(BATCH):
            total = self.reference.kept[b].shape[1]
            visible = self.mask[b, 0][:, self.real[b]]
            want = (reference or self.reference).attention(self.query[b], total - new, b, self.model, stepwise, visible)
            worst = max(worst, float((out[b] - want).abs().max()))
        return worst


def check(tiny_config, name, impl, tolerance, model="plain", dtype=torch.float64, by_head=True, later=LATER):
    run = Run(make_layer(tiny_config, name, impl, by_head), MODELS[model], dtype)
    run.prompt(Evictor(protected=9, alike=not by_head))
    assert len({int(kept.sum()) for b in range(BATCH) for kept in run.reference.kept[b]}) == (4 if by_head else 2)
    for new in later:
        assert run.error(run.forward(new)) < tolerance, new
    return run, {ran.impl for store in run.layer.stores for ran in store.ran}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", RECIPES)
def test_torch_reads_exactly_the_survivors(tiny_config, name, model):
    assert check(tiny_config, name, "reference", 1e-9, model)[1] == {"reference"}


@pytest.mark.parametrize("name", RECIPES)
def test_heads_that_are_stored_together_drop_the_same_tokens(tiny_config, name):
    assert check(tiny_config, name, "reference", 1e-9, by_head=False)[1] == {"reference"}


@pytest.mark.skipif(CPP is not None, reason="the C++ kernels are not built here")
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["tokens", "blocks of keys"])
def test_the_compiled_kernel_reads_tables_and_lengths_by_head(tiny_config, name, model):
    assert check(tiny_config, name, "auto", 1e-9, model)[1] == {"cpp", "reference"}
    assert check(tiny_config, name, "auto", 2e-5, model, torch.float32)[1] == {"cpp", "reference"}


@pytest.mark.skipif(TRITON is not None, reason=str(TRITON))
@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "model"),
    [("tokens", "sink logits"), ("sinks and blocks", "softcap"), ("keys before RoPE", "plain")],
)
def test_the_triton_kernels_read_tables_and_lengths_by_head(tiny_config, name, model):
    """Queries and weights are rounded to 16 bits there. The last step reads a block that the survivors have filled."""
    # Chunks of more than 16 tokens are read otherwise, and not with a softcap.
    later = (1, 13 if model == "softcap" else 40, 1)
    assert check(tiny_config, name, "triton", 5e-3, model, torch.float32, later=later)[1] == {"triton"}


@pytest.mark.parametrize("name", ["tokens", "keys before RoPE"])
def test_masks_follow_what_was_seen(tiny_config, name):
    """A sliding mask counts columns of the model, pads and dropped tokens included."""
    run = Run(make_layer(tiny_config, name))
    run.prompt(Evictor(protected=9))
    for new in (1, 5, 1):
        assert run.error(run.forward(new, window=70)) < 1e-9
    out = run.forward(1, window=70)
    run.mask[:] = run.real[:, None, None]
    assert run.error(out) > 1e-2


def test_what_the_reference_would_tell_apart(tiny_config):
    """Negative controls: another head's survivors, survivors at the places they moved to, tokens that were kept."""
    run, _ = check(tiny_config, "keys before RoPE", "reference", 1e-9)
    out = run.forward(1)
    assert run.error(out) < 1e-9
    swapped = Reference(run.layer.groups[0])
    swapped.tokens, swapped.kept = run.reference.tokens, [kept.flip(0) for kept in run.reference.kept]
    whole = Reference(run.layer.groups[0])
    whole.tokens, whole.kept = run.reference.tokens, [torch.ones_like(kept) for kept in run.reference.kept]
    for other in (swapped, whole):
        assert run.error(out, reference=other) > 1e-2
    moved = Reference(run.layer.groups[0])
    moved.tokens, moved.kept, seen_by = run.reference.tokens, run.reference.kept, Reference.seen_by
    moved.seen_by = lambda side, b, k, before, end: seen_by(
        moved, side, b, k, before, end, moved.kept[b][k, :end].long().cumsum(0)
    )
    assert run.error(out, reference=moved) > 1e-4


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("by_head", [True, False])
@pytest.mark.parametrize("name", RECIPES)
def test_beams_and_crops(tiny_config, name, by_head, impl):
    """With past recording on, drafts are taken back, and rows change places; the survivors stay theirs."""
    run = Run(make_layer(tiny_config, name, impl, by_head))
    run.layer.activate_past_recording()
    run.prompt(Evictor(protected=129, alike=not by_head))
    assert run.error(run.forward(1)) < 1e-9
    for new, back, order in ((3, 2, [1, 1]), (4, 4, [0, 1]), (5, 1, [1, 0])):
        assert run.error(run.forward(new), stepwise=True) < 1e-9
        run.layer.crop(-back)
        run.layer.reorder_cache(torch.tensor(order))
        run.real = run.real[order][:, :-back]
        for field in ("tokens", "kept"):
            setattr(run.reference, field, [getattr(run.reference, field)[b] for b in order])
        run.reference.tokens = [{side: x[:, :-back] for side, x in held.items()} for held in run.reference.tokens]
        run.reference.kept = [kept[:, :-back] for kept in run.reference.kept]
        assert run.error(run.forward(1)) < 1e-9


def test_a_prompt_in_chunks_is_read_exactly_until_somebody_decides(tiny_config):
    """What is held is packed nowhere and never written to: the tensors of a prompt stay the model's."""
    run = Run(make_layer(tiny_config, "sinks and blocks", settings={"tokens.sinks": 20}), pads=0)
    run.layer.hold()
    query, keys, values = run.numbers(40)
    lent = keys.clone(), values.clone()
    run.layer.update(keys, values)
    store = run.layer.stores[0]
    assert store.tails["key"].buffer.untyped_storage().data_ptr() == keys.untyped_storage().data_ptr()
    run.layer.crop(-4)
    found, _ = run.layer.update(*(x[:, :, :3] for x in (query[:, :KV_HEADS], query[:, KV_HEADS:])))
    assert torch.equal(found[:, :, :36], lent[0][:, :, :36])
    assert torch.equal(found[:, :, 36:], query[:, :KV_HEADS, :3])
    assert (keys == lent[0]).all()
    assert (values == lent[1]).all()
    assert store.pool.nbytes == 0
    assert store.stored == [39] * BATCH * KV_HEADS
    run.layer.release()
    assert store.packed == {"key": [0] * 4, "value": [0] * 4}
    run.layer.update(keys, values)
    assert store.packed == {"key": [32] * 4, "value": [27] * 4}


@pytest.mark.parametrize("name", RECIPES)
def test_nothing_dropped_is_nothing_changed(tiny_config, name):
    """Seen is stored, and heads that lie by themselves lie as they lie together: bytes, numbers and outputs."""
    outs, stores = [], []
    for by_head in (False, True):
        run = Run(make_layer(tiny_config, name, "reference", by_head))
        outs.append([run.forward(new) for new in (PROMPT, *LATER)])
        run.layer.drop(torch.zeros(BATCH, KV_HEADS, run.layer.length, dtype=torch.bool))
        stores.append(run.layer.stores[0])
        assert stores[-1].kept is None
        assert stores[-1].seen == stores[-1].stored
        outs[-1] += [run.layer.keys, run.layer.values]
    for together, apart in zip(*outs, strict=True):
        assert torch.equal(together, apart)
    plain, split = stores
    assert [n for n in plain.seen for _ in range(KV_HEADS)] == split.seen
    for side in SIDES:
        assert [n for n in plain.packed[side] for _ in range(KV_HEADS)] == split.packed[side]
    for row, table in enumerate(plain.tables.rows):
        for k in range(KV_HEADS):
            own = split.tables.rows[row * KV_HEADS + k]
            assert len(own) == len(table)
            for page, single in zip(table, own, strict=True):
                assert torch.equal(plain.pool.records(page)[k], split.pool.records(single)[0])
    tails = [sum(tail.nbytes for tail in store.tails.values()) for store in stores]
    assert tails[0] == tails[1]


def test_dropped_tokens_cost_nothing(tiny_config):
    """Every head has the pages of what it stores; beside them there is one bit for each token that was seen."""
    stores = []
    for evictor in (None, Evictor(protected=9, share=0.2)):
        run = Run(make_layer(tiny_config, "tokens"))
        run.prompt(evictor)
        stores.append(run.layer.stores[0])
    whole, less = stores
    assert [len(table) for table in less.tables.rows] == [-(-(n - 3 - 5) // 64) for n in less.stored]
    assert sum(map(len, less.tables.rows)) < sum(map(len, whole.tables.rows))
    assert less.kept.nbytes <= BATCH * KV_HEADS * (PROMPT + 7) // 8
    assert less.pool.readers.sum() == sum(map(len, less.tables.rows))
    assert less.nbytes < whole.nbytes


def test_what_cannot_be_dropped(tiny_config):
    def marked(layer, *tokens, heads=slice(None)):
        gone = torch.zeros(BATCH, KV_HEADS, layer.length, dtype=torch.bool)
        gone[:, heads, list(tokens)] = True
        return gone

    run = Run(make_layer(tiny_config, "tokens"), pads=0)
    run.forward(30)
    layer, state = run.layer, list(run.layer.stores[0].stored)
    for token in (0, 3, 24):
        with pytest.raises(CacheError, match="sinks or quantized for good"):
            layer.drop(marked(layer, token))
    assert layer.stores[0].stored == state
    layer.drop(marked(layer, 26, 28))
    layer.drop(marked(layer, 26))
    assert layer.stores[0].stored == [n - 2 for n in state]
    with pytest.raises(CacheError, match="were dropped already"):
        layer.crop(-3)
    layer.activate_past_recording()
    with pytest.raises(CacheError, match="newest 128 tokens"):
        layer.drop(marked(layer, 29))

    together = Run(make_layer(tiny_config, "tokens", by_head=False), pads=0)
    together.forward(30)
    with pytest.raises(CacheError, match="cannot drop different tokens"):
        together.layer.drop(marked(together.layer, 27, heads=0))

    other = make_layer(tiny_config, "tokens")
    other.update(*(torch.randn(BATCH, KV_HEADS, 30, HEAD_DIM) for _ in range(2)))
    other.drop(marked(other, 27))
    with pytest.raises(CacheError, match="read by another attention"):
        other.update(*(torch.randn(BATCH, KV_HEADS, 1, HEAD_DIM) for _ in range(2)))


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [("kvquant3", {}), ("skvq2", {"key.group": 32, "value.group": 32}), ("int8", {"value.group": "token"})],
    ids=str,
)
def test_heads_that_share_numbers_cannot_lie_by_themselves(tiny_config, recipe, settings):
    spec = describe(tiny_config(layers=1, heads=KV_HEADS * GROUP, kv_heads=KV_HEADS, head_dim=HEAD_DIM))
    recipe = load_recipe(recipe).override(settings)
    (group,) = make_plan(recipe, spec, stand_in_artefacts(recipe, spec)).layers[0]
    with pytest.raises(RecipeError, match="cannot be stored by head"):
        dataclasses.replace(group, by_head=True)
