"""The packed state is a function of each row's real tokens alone (chunking, batch and padding laws, bit for bit)."""

import itertools
from collections import Counter

import pytest
import torch

from kvq.cache.plan import make_plan
from kvq.cache.reading import pages_with, stored_tokens
from kvq.cache.store import HeadStore
from kvq.calib.artefacts import stand_in_artefacts
from kvq.errors import CacheError
from kvq.models.describe import describe
from kvq.recipe import list_recipes, load_recipe, parse_recipe

RECIPES = {
    "kivi2": {},
    "kivi2-window-32": {"tokens.window": 32},
    "kivi4-no-window": {"tokens.window": 0, "key.bits": 4},
    "int4": {},
    "int4-sinks": {"tokens.sinks": 5, "tokens.window": 9},
    "kivi2-sinks": {"tokens.sinks": 3, "tokens.window": 64, "key.bits": 3},
    "int8": {},
    "fp8": {"key.scale": "unit", "value.scale": "unit"},
    "kivi2-channel-values": {"value.axis": "channel", "value.group": 64, "tokens.window": 64, "key.group": 16},
    "kivi2-group-128": {"key.group": 128},
}


def side(codec, **settings):
    return {"codec": codec} | settings


GEAR = {"low_rank": {"rank": 2, "block": 64}, "outliers": {"share": 0.05, "along": "channel"}}
TOKEN_OUTLIERS = {"outliers": {"share": 0.05, "along": "token"}}
FAMILIES = {
    "tiers": {
        "key": side("tiers", bits=[4, 2], group=64),
        "value": side("tiers", bits=[0, 3], group=128, meta="zero8"),
        "tokens": {"sinks": 2, "window": 128},
    },
    "sketch, codebook": {
        "key": side("sketch", bits=4, outlier_channels=3, outlier_bits=2, group=32),
        "value": side("book", bits=4, levels="normal_float", scale="absmax", axis="token", group=16),
        "tokens": {"window": 64},
    },
    "gear": {
        "key": side("affine", bits=2, axis="channel", group=64, **GEAR),
        "value": side("affine", bits=2, axis="token", group=16, low_rank={"rank": 1, "block": 128}, **TOKEN_OUTLIERS),
        "tokens": {"sinks": 3},
    },
    "block floats, shared scale": {
        "key": side("float4", group=32, meta="e8m0", norm={"over": "token"}),
        "value": side("affine", bits=8, axis="token", group="token", symmetric=True),
        "tokens": {"sinks": 1},
    },
    "lengths, signs, outliers": {
        "key": side("book", bits=2, levels="lloyd_max", scale="unit", norm={"over": "head"}, signs={"seed": 1}),
        "value": side("book", bits=3, levels="lloyd_max", scale="unit", norm={"over": "head"}, **TOKEN_OUTLIERS),
        "tokens": {"window": 17},
    },
    "kvquant": {
        "key": load_recipe("kvquant3").key.to_dict(),
        "value": load_recipe("kvquant2").value.to_dict(),
        "tokens": {"sinks": 2, "window": 11},
    },
    "metadata of 8 bits": {
        "key": side("affine", bits=2, axis="channel", group=32, meta="range8"),
        "value": side("affine", bits=2, axis="token", group=16, meta="zero8"),
        "tokens": {"window": 32, "sinks": 5},
    },
}


@pytest.fixture(params=[*sorted(RECIPES), *FAMILIES])
def group(request, tiny_config):
    if request.param in FAMILIES:
        recipe = parse_recipe({"name": "test"} | FAMILIES[request.param], source="test")
    else:
        recipe = load_recipe(request.param.split("-")[0]).override(RECIPES[request.param])
    spec = describe(tiny_config(head_dim=32))
    return make_plan(recipe, spec, stand_in_artefacts(recipe, spec)).layers[0][0]


def tokens(rows, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, 2, count, 32)
    return {side: torch.randn(shape, generator=generator) * 2 + 0.5 for side in ("key", "value")}


def build(group, x, cuts, valid=None):
    store = HeadStore(group, x["key"].shape[0], torch.device("cpu"))
    for a, b in itertools.pairwise(cuts):
        part = {side: t[:, :, a:b] for side, t in x.items()}
        store.append(part, None if valid is None else valid[:, a:b])
    return store


def state(store, row):
    """Everything that counts of one row: packed codes and metadata of written tokens, sinks, exact tail."""
    found = {}
    body = max(0, store.seen[row] - store.group.sinks)
    for side in ("key", "value"):
        done = store.packed[side][row]
        if done:
            pages, _ = pages_with(store, [row], 0, done)
            found[side, "codes"] = pages.codes(side)[0, :, :done]
            found[side, "numbers"] = store.group.codecs[side].dequantized(pages, side, torch.float32)[0, :, :done]
        found[side, "tail"] = store.tails[side].last([row], body - done)[0] if body > done else torch.empty(0)
        if side in store.sinks:
            found[side, "sinks"] = store.sinks[side][row, :, : min(store.seen[row], store.group.sinks)]
    return found


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def cuts_of(total, *sizes):
    cuts, i = [0], 0
    while cuts[-1] < total:
        cuts.append(min(total, cuts[-1] + sizes[i % len(sizes)]))
        i += 1
    return cuts


@pytest.mark.parametrize("sizes", [(1,), (37,), (64,), (1, 130, 5), (300, 1)])
def test_chunking_law(group, sizes):
    x = tokens(1, 331)
    assert_same(state(build(group, x, cuts_of(331, *sizes)), 0), state(build(group, x, [0, 331]), 0))


def test_the_laws_hold_for_tokens_of_sixteen_bits(group):
    """Chunks, batch and pads, and the bytes are those of the same numbers in float32."""
    x = {side: t.bfloat16() for side, t in tokens(2, 203, seed=6).items()}
    valid = torch.ones(2, 203, dtype=torch.bool)
    valid[1, 20:51] = False
    together = build(group, x, cuts_of(203, 50, 1, 33), valid)
    for row in range(2):
        alone = {side: t[row : row + 1, :, valid[row]] for side, t in x.items()}
        count = int(valid[row].sum())
        found = state(together, row)
        assert_same(found, state(build(group, alone, [0, count]), 0))
        single = state(build(group, {side: t.float() for side, t in alone.items()}, [0, count]), 0)
        assert any(found[name].numel() for name in found if name[1] == "numbers")
        assert_same({n: t.float() for n, t in found.items()}, {n: t.float() for n, t in single.items()})


def test_batch_law(group):
    x = tokens(3, 203)
    together = build(group, x, cuts_of(203, 50, 1))
    for row in range(3):
        alone = {side: t[row : row + 1] for side, t in x.items()}
        assert_same(state(together, row), state(build(group, alone, [0, 203]), 0))


@pytest.mark.parametrize("where", ["left", "right", "scattered"])
def test_padding_law(group, where):
    """Pads, however placed and however large, leave a row's packed bytes as if it were alone."""
    x, total = tokens(3, 230), 230
    valid = torch.ones(3, total, dtype=torch.bool)
    if where == "left":
        valid[0, :71] = False
        valid[2, :3] = False
    elif where == "right":
        valid[1, 150:200] = False
    else:
        valid[0, ::7] = False
        valid[1, 40:90] = False
    x = {side: torch.where(valid[:, None, :, None], t, torch.tensor(1e4)) for side, t in x.items()}
    padded = build(group, x, [0, 200, *range(201, 231)], valid)
    for row in range(3):
        alone = {side: t[row : row + 1, :, valid[row]] for side, t in x.items()}
        count = int(valid[row].sum())
        assert padded.seen[row] == count
        assert_same(state(padded, row), state(build(group, alone, [0, count]), 0))


def test_pads_would_change_the_state_if_they_were_not_dropped(group):
    """Negative control of the padding law."""
    x = tokens(1, 230)
    valid = torch.ones(1, 230, dtype=torch.bool)
    valid[0, :71] = False
    dropped = state(build(group, x, [0, 230], valid), 0)
    kept = state(build(group, x, [0, 230]), 0)
    assert any(dropped[name].shape != kept[name].shape or not torch.equal(dropped[name], kept[name]) for name in kept)


def test_what_is_packed_never_changes_again(group):
    x = tokens(1, 400)
    store = build(group, x, [0, 300])
    before = state(store, 0)
    for t in range(300, 400):
        store.append({side: v[:, :, t : t + 1] for side, v in x.items()}, None)
    after = state(store, 0)
    for side in ("key", "value"):
        if (side, "codes") in before:
            kept = before[side, "codes"].shape[1]
            assert torch.equal(after[side, "codes"][:, :kept], before[side, "codes"])
            assert torch.equal(after[side, "numbers"][:, :kept], before[side, "numbers"])


def test_selecting_rows_and_going_on_equals_rows_that_were_there_from_the_start(group):
    """Beams: rows that share pages must not write into each other's."""
    x, more = tokens(3, 150), tokens(4, 90, seed=1)
    order = torch.tensor([2, 0, 2, 2])
    store = build(group, x, [0, 150])
    store.select(order)
    for t in range(90):
        store.append({side: v[:, :, t : t + 1] for side, v in more.items()}, None)
    for row, source in enumerate(order.tolist()):
        joined = {side: torch.cat([x[side][source : source + 1], more[side][row : row + 1]], dim=2) for side in x}
        assert_same(state(store, row), state(build(group, joined, [0, 240]), 0))


def test_rows_that_shared_pages_are_apart_after_a_crop_to_nothing(group):
    """What comes after it is what a fresh store holds: rows do not write into each other's pages."""
    store = build(group, tokens(2, 300), [0, 300])
    store.select(torch.tensor([1, 1]))
    store.crop([300] * len(store.seen))
    x = tokens(2, 300, seed=1)
    store.append(x, None)
    fresh = build(group, x, [0, 300])
    for row in range(2):
        assert_same(state(store, row), state(fresh, row))


def miscounted(store) -> list[int]:
    """Pages whose count is not that of the rows that name them, or that are free and not zero."""
    pool, named = store.pool, Counter(itertools.chain(*store.tables.rows))
    stale = {page for page in range(pool.pages) if not named[page] and pool.records(page).any()}
    return [page for page in range(pool.pages) if pool.readers[page] != named[page] or page in stale]


def beams(tiny_config, rows: int, count: int) -> HeadStore:
    recipe = load_recipe("int4")
    group = make_plan(recipe, describe(tiny_config(head_dim=32))).layers[0][0]
    return build(group, tokens(rows, count), [0, count])


def test_every_page_counts_the_rows_that_name_it(tiny_config):
    store, generator = beams(tiny_config, 4, 300), torch.Generator().manual_seed(2)
    for count in torch.randint(1, 90, (30,), generator=generator).tolist():
        rows = len(store.tables)
        store.select(torch.randint(0, rows, (max(1, rows + count % 3 - 1),), generator=generator))
        assert not miscounted(store)
        store.append(tokens(len(store.tables), count), None)
        assert not miscounted(store)
        closed = [min(store.packed[side][row] for side in store.packed) for row in range(len(store.tables))]
        size = store.group.layout.page_tokens
        assert all(
            (store.pool.readers[t[n // size :]] == 1).all() for t, n in zip(store.tables.rows, closed, strict=True)
        )
    # Negative control: a count that is wrong, and a free page with something in it.
    store.pool.share(store.tables.rows[0][:1])
    assert miscounted(store) == store.tables.rows[0][:1]
    store = beams(tiny_config, 4, 300)
    store.select(torch.tensor([0]))
    free = int((store.pool.readers == 0).nonzero()[0][0])
    store.pool.records(free).fill_(1)
    assert miscounted(store) == [free]


def test_selecting_touches_only_pages_that_change_hands(tiny_config, monkeypatch):
    store = beams(tiny_config, 4, 3000)
    store.select(torch.tensor([0, 0, 0, 0]))
    store.append(tokens(4, 1), None)
    touched = []
    for name in ("share", "release"):
        original = getattr(store.pool, name)
        monkeypatch.setattr(store.pool, name, lambda ids, run=original: (touched.append(len(ids)), run(ids)))
    kept = [list(store.tables.rows[row]) for row in (0, 3)]
    store.select(torch.tensor([0, 0, 1, 3]))
    assert sum(touched) <= 2 * 3 * 2 < len(store.tables.rows[0])
    assert [store.tables.rows[row] for row in (0, 3)] == kept
    touched.clear()
    store.select(torch.tensor([0, 1, 2, 3]))
    assert not sum(touched)


def test_released_pages_are_used_again(group):
    x = tokens(4, 300)
    store = build(group, x, [0, 300])
    pages = store.pool.pages
    store.select(torch.tensor([1, 1, 1, 1]))
    store.append({side: v[:, :, :128] for side, v in x.items()}, None)
    assert store.pool.pages <= pages + 2


@pytest.mark.parametrize("draft", [1, 5, 40])
def test_crop_law(group, draft):
    """With past recording, tokens that are cropped away leave no trace, across every flush boundary."""
    x, wrong = tokens(1, 300), tokens(1, 300, seed=9)
    store = HeadStore(group, 1, torch.device("cpu"))
    store.recording = True
    store.append({side: v[:, :, :100] for side, v in x.items()}, None)
    for t in range(100, 300):
        store.append({side: v[:, :, :draft] for side, v in wrong.items()}, None)
        store.crop([draft] * len(store.seen))
        store.append({side: v[:, :, t : t + 1] for side, v in x.items()}, None)
    assert_same(state(store, 0), state(build(group, x, [0, 300]), 0))


def test_crop_of_quantized_tokens_is_refused(group):
    store = build(group, tokens(1, 300), [0, 300])
    with pytest.raises(CacheError, match="activate_past_recording"):
        store.crop([200] * len(store.seen))
    assert store.seen == [300]


def test_keys_before_rope_keep_the_positions_they_were_given(tiny_config):
    """Positions with gaps, as after an eviction: what is read is what encoding at those very positions gives."""
    recipe = parse_recipe({"name": "test"} | FAMILIES["kvquant"], source="test")
    spec = describe(tiny_config(head_dim=32))
    group = make_plan(recipe, spec, stand_in_artefacts(recipe, spec)).layers[0][0]
    x, count, start = tokens(2, 150), 150, group.sinks
    gaps = torch.randint(1, 9, (2, count), generator=torch.Generator().manual_seed(5))
    positions = gaps.cumsum(1)
    given = {"key": group.frame.leave(x["key"], positions), "value": x["value"]}
    store = HeadStore(group, 2, torch.device("cpu"))
    for a, b in itertools.pairwise([0, 70, 71, 130, count]):
        store.append({name: t[:, :, a:b] for name, t in given.items()}, None, None, positions[:, a:b])
    packed = store.packed["key"][0]
    codec = group.codecs["key"]
    decoded = codec.decode(codec.encode(x["key"][:, :, start : start + packed]), torch.float32)
    expected = group.frame.leave(decoded, positions[:, start : start + packed])
    found = stored_tokens(store, "key", [0, 1])[:, :, start : start + packed]
    # Taking a key back from its position rounds, so a number at the edge of two codes may change its code.
    gap = (found - expected).abs().amax(-1)
    assert (gap < 1e-4).double().mean() > 0.97
    # Negative control: the same keys at positions without gaps are others.
    counted = group.frame.leave(decoded, torch.arange(start, start + packed).unsqueeze(0))
    assert ((found - counted).abs().amax(-1) < 1e-4).double().mean() < 0.1


def page_sections(group):
    """Every section of a page, words of keys and values included."""
    return [*group.layout.key.sections, *group.layout.value.sections, "key words", "value words"]


def stored_differently():
    """Names of shipped recipes, one for each choice of codecs and exact tokens."""
    recipes = [load_recipe(name) for name in list_recipes()]
    return sorted({(r.key, r.value, r.tokens): r.name for r in recipes if not r.is_exact}.values())


@pytest.mark.parametrize("name", stored_differently())
def test_bytes_law_of_every_recipe(tiny_config, name):
    """Predicted bytes are stored bytes, and at 32,768 tokens those of whole pages, padding included."""
    recipe, spec = load_recipe(name), describe(tiny_config(layers=1, heads=1, kv_heads=1, head_dim=64))
    plan = make_plan(recipe, spec, stand_in_artefacts(recipe, spec))
    (group,) = plan.layers[0]
    store, done = HeadStore(group, 1, torch.device("cpu")), 0
    for length in (512, 4096, 32768):
        x = torch.randn(2, 1, 1, length - done, 64, generator=torch.Generator().manual_seed(length))
        store.append({"key": x[0].bfloat16(), "value": x[1].bfloat16()}, None)
        done = length
        assert store.nbytes == group.predicted_bytes(length, 2)
    bits = 8 * store.nbytes / (2 * length * 64)
    page_bits = 8 * (group.layout.record_bytes + group.layout.shared_bytes) / (2 * group.layout.page_tokens * 64)
    exact_tokens = (group.sinks + 2 * 256) * 16 / length
    assert plan.bits_per_element == page_bits
    assert page_bits <= bits < page_bits + exact_tokens
