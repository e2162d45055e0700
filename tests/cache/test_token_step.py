"""A token for rows that are alike, on the CPU: the state, the bytes and the outputs of the general way, to the bit."""

import copy

import pytest
import torch

import kvq.cache.token_step as token_step
from kvq.cache.attend import Options, attend
from kvq.cache.fused import Steps
from kvq.cache.plan import make_plan
from kvq.cache.reading import stored_tokens
from kvq.cache.snapshot import Snapshot, TokenSnapshot
from kvq.cache.store import HeadStore
from kvq.calib.artefacts import stand_in_artefacts
from kvq.kernels.cpp import build
from kvq.models.describe import describe
from kvq.pages.layout import SIDES
from kvq.recipe import load_recipe

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=f"{build.unavailable()}")
KV_HEADS, GROUP, HEAD_DIM, BATCH = 3, 2, 64, 2
# Prompts after which a few steps end a page, a block of keys, or both.
PROMPTS = {"klt2": 257, "kivi2": 125, "int4": 61, "gear2": 61}


def made(tiny_config, name: str) -> HeadStore:
    spec = describe(tiny_config(layers=1, heads=KV_HEADS * GROUP, kv_heads=KV_HEADS, head_dim=HEAD_DIM))
    artefacts = stand_in_artefacts(load_recipe(name), spec)
    for what, own in artefacts.items():
        if own.ndim == 3 and own.shape[1] == own.shape[2]:
            generator = torch.Generator().manual_seed(2)
            artefacts[what] = torch.linalg.qr(torch.randn(own.shape, generator=generator, dtype=own.dtype)).Q
    group = make_plan(load_recipe(name), spec, artefacts).layers[0][0]
    return HeadStore(group, BATCH, torch.device("cpu"), torch.float32)


def feed(store: HeadStore, new: int, seed: int, steps: Steps, valid=None) -> tuple[Snapshot, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(3, BATCH, KV_HEADS, new, HEAD_DIM, generator=generator)
    snapshot = store.append({"key": drawn[0], "value": drawn[1]}, valid)
    q = drawn[2][:, :, None].expand(-1, -1, GROUP, -1, -1).contiguous()
    lse = torch.empty(q.shape[:4])
    found = attend(store, snapshot, q, None, valid, Options(scaling=0.125), steps, lse)
    return snapshot, torch.cat([found.flatten(), lse.flatten()])


@pytest.mark.parametrize("name", PROMPTS)
def test_it_leaves_what_the_general_way_leaves(tiny_config, monkeypatch, name):
    fast, slow = made(tiny_config, name), made(tiny_config, name)
    stores, served = (fast, slow), token_step.serves
    steps = Steps(), Steps()
    for step in range(8):
        found = []
        for store, own in zip(stores, steps):
            monkeypatch.setattr(token_step, "serves", served if store is fast else lambda *_: False)
            found.append(feed(store, PROMPTS[name] if step == 0 else 1, step, own))
        (snapshot, out), (general, want) = found
        assert isinstance(snapshot, TokenSnapshot) == (step > 0)
        assert not isinstance(general, TokenSnapshot)
        assert torch.equal(out, want)
        for side in SIDES:
            assert torch.equal(snapshot.exact[side], general.exact[side])
        assert (snapshot.before, snapshot.added, snapshot.views) == (general.before, general.added, general.views)
        assert (fast.seen, fast.stored, fast.packed) == (slow.seen, slow.stored, slow.packed)
        assert [t.lengths for t in fast.tails.values()] == [t.lengths for t in slow.tails.values()]
        assert fast.nbytes == slow.nbytes
        if fast.positions is not None:
            assert fast.positions.runs == slow.positions.runs
    assert fast.packed["key"][0] > 0
    for side in SIDES:
        assert torch.equal(stored_tokens(fast, side, [0, 1]), stored_tokens(slow, side, [0, 1]))


def test_a_copy_goes_on_by_itself(tiny_config):
    """What a store holds of its last step belongs to its own pages."""
    store = made(tiny_config, "klt2")
    for step in range(3):
        feed(store, 257 if step == 0 else 1, step, Steps())
    other = copy.deepcopy(store)
    first, second = (feed(own, 1, 9, Steps())[1] for own in (store, other))
    assert torch.equal(first, second)
    other.pool.slabs[0].zero_()
    assert not torch.equal(feed(other, 1, 10, Steps())[1], feed(store, 1, 10, Steps())[1])


def test_rows_that_differ_go_the_general_way(tiny_config):
    store = made(tiny_config, "kivi2")
    valid = torch.ones(BATCH, 130, dtype=torch.bool)
    valid[0, :3] = False
    feed(store, 130, 0, Steps(), valid)
    assert not isinstance(feed(store, 1, 1, Steps())[0], TokenSnapshot)
    store = made(tiny_config, "kivi2")
    feed(store, 130, 0, Steps())
    store.recording = True
    assert not isinstance(feed(store, 1, 1, Steps())[0], TokenSnapshot)
    store.recording = False
    assert isinstance(feed(store, 1, 2, Steps())[0], TokenSnapshot)
