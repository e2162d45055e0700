"""Single tokens that the device handles alone: the same bytes and outputs as the host's way, at addresses that stay.

The kernels run in Triton's interpreter. A layer is driven as a model drives it: update, then attention by the handle.
"""

import copy
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from kvq.cache.attend import Options
from kvq.cache.context import ForwardContext
from kvq.cache.layer import HANDLE, PackedLayer
from kvq.cache.plan import make_plan
from kvq.kernels.device.launch import Launch
from kvq.kernels.dispatch import why_no_triton
from kvq.models.describe import describe
from kvq.recipe import load_recipe

NO_TRITON = why_no_triton(torch.device("cpu"))
pytestmark = pytest.mark.skipif(NO_TRITON is not None, reason=str(NO_TRITON))

KV_HEADS, GROUP, HEAD_DIM, BATCH = 1, 2, 32, 2
# Tokens of a prompt after which five steps cross the end of a page.
PROMPTS = {"tokens, sinks": 69, "blocks of keys": 93, "clipped": 69, "fp8, no window": 61, "heads share": 61}
PROMPTS |= {"books": 69, "keys over lengths": 93}
RECIPES = {
    "tokens, sinks": ("int4", {"tokens.sinks": 3, "tokens.window": 5}),
    "blocks of keys": ("kivi2", {"tokens.window": 32}),
    "clipped": ("int3", {"key.clip": 0.9, "value.clip": 0.8, "tokens.window": 7}),
    "heads share": ("zeroquant8", {}),
    "books": ("nf4", {"key.bits": 2, "value.bits": 2, "tokens.window": 7}),
    "keys over lengths": (
        "kivi2",
        {"tokens.window": 32, "key.norm": {"over": "token"}, "value.clip": 0.8, "value.meta": "zero8"},
    ),
    "fp8, no window": ("fp8", {"key.scale": "unit", "value.scale": "unit"}),
}


class Driven:
    """A layer and the numbers that it is given; two of one seed are given the same."""

    def __init__(self, tiny_config, name: str, impl: str, pads: int = 0):
        recipe, settings = RECIPES[name]
        config = tiny_config(layers=1, heads=KV_HEADS * GROUP, kv_heads=KV_HEADS, head_dim=HEAD_DIM)
        plan = make_plan(load_recipe(recipe).override(settings), describe(config))
        self.context = ForwardContext(impl)
        self.layer = PackedLayer(plan.layers[0], self.context)
        self.layer.reads_handle = True
        self.generator = torch.Generator().manual_seed(3)
        self.pads = pads

    @property
    def store(self):
        return self.layer.stores[0]

    def draw(self, heads: int, new: int) -> torch.Tensor:
        return torch.randn(len(self.store.seen) if self.layer.stores else BATCH, heads, new, HEAD_DIM,
                           generator=self.generator)  # fmt: skip

    def feed(self, new: int, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Attention outputs of ``new`` tokens. ``mask`` [B, T]: a mask beside the causal one."""
        keys, values, query = self.draw(KV_HEADS, new), self.draw(KV_HEADS, new), self.draw(KV_HEADS * GROUP, new)
        if self.pads:
            real = torch.ones(len(keys), self.layer.length + new, dtype=torch.bool)
            real[0, : self.pads] = False
            self.context.begin(real)
        else:
            self.context.begin(None)
        found, _ = self.layer.update(keys, values)
        handle = getattr(found, HANDLE)
        if handle.is_prompt:
            return query
        mask = None if mask is None else mask[:, None, None]
        return handle.attend(query, mask, Options(scaling=HEAD_DIM**-0.5))

    def stored(self) -> torch.Tensor:
        return torch.stack([self.layer.keys, self.layer.values])


def both(tiny_config, name: str, **settings) -> list[Driven]:
    return [Driven(tiny_config, name, impl, **settings) for impl in ("triton", "reference")]


def close(found: torch.Tensor, want: torch.Tensor) -> bool:
    return bool((found - want).abs().max() < 3e-3 * want.abs().max())


@pytest.mark.parametrize(
    ("name", "pads"), [*((name, 0) for name in RECIPES), ("tokens, sinks", 4), ("blocks of keys", 1)]
)
def test_steps_give_the_bytes_and_outputs_of_the_host(tiny_config, name, pads):
    """Across a page's end, rows of different length included; then all that is stored is the same to the bit."""
    device, host = both(tiny_config, name, pads=pads)
    for driven in (device, host):
        driven.feed(PROMPTS[name])
    pages = len(device.store.tables.rows[1])
    for _ in range(5):
        assert close(device.feed(1), host.feed(1))
        assert device.store.step is not None
        assert host.store.step is None
    assert torch.equal(device.stored(), host.stored())
    assert len(device.store.tables.rows[1]) == len(host.store.tables.rows[1]) == pages + 1
    # Asking has ended it; the next token starts it anew.
    assert device.store.step is None
    assert device.store.packed == host.store.packed
    assert close(device.feed(1), host.feed(1))
    assert device.store.step is not None


def test_transforms_as_one_product_give_the_outputs_of_their_steps(tiny_config, monkeypatch):
    monkeypatch.setitem(RECIPES, "rotated", ("quarot4", {}))
    device, host = both(tiny_config, "rotated")
    for driven in (device, host):
        driven.feed(66)
    for _ in range(3):
        assert close(device.feed(1), host.feed(1))
        assert device.store.step is not None
    assert float((device.stored() - host.stored()).abs().max()) < 1e-4


def test_it_is_left_for_whatever_else_is_asked(tiny_config):
    """Several tokens, beams, a copy, offloading: as on the host, and steps go on after."""
    device, host = both(tiny_config, "tokens, sinks")
    for driven in (device, host):
        driven.feed(70)
        driven.feed(1)
    assert close(device.feed(3), host.feed(3))
    assert device.store.step is None
    assert close(device.feed(1), host.feed(1))
    assert device.store.step is not None
    for driven in (device, host):
        driven.layer.batch_select_indices(torch.tensor([1, 1, 0]))
    assert close(device.feed(1), host.feed(1))
    twin = copy.deepcopy(device)
    assert twin.store.step is not None
    assert twin.store.step.counters is not device.store.step.counters
    want = host.feed(1)
    assert close(twin.feed(1), want)
    assert close(device.feed(1), want)
    for driven in (device, host):
        driven.layer.offload()
        driven.layer.prefetch()
    assert close(device.feed(1), host.feed(1))
    assert torch.equal(device.stored(), host.stored())


def test_a_mask_of_its_own_is_obeyed_in_a_step(tiny_config):
    device, host = (Driven(tiny_config, "tokens, sinks", impl) for impl in ("triton", "reference"))
    for driven in (device, host):
        driven.feed(70)
        driven.feed(1)
    mask = torch.ones(BATCH, 72, dtype=torch.bool)
    mask[:, 30:50] = False
    device.store.impl = "auto"
    step = device.store.step
    out = device.feed(1, mask)
    assert device.store.step is step
    assert close(out, host.feed(1, mask))
    device.store.impl = "triton"
    assert close(device.feed(1), host.feed(1))


def test_a_short_prompt_and_sinks_that_fill_while_decoding(tiny_config):
    """Two tokens of three sinks, nothing packed yet, no page taken."""
    device, host = both(tiny_config, "tokens, sinks")
    for driven in (device, host):
        driven.feed(2)
    for _ in range(8):
        assert close(device.feed(1), host.feed(1))
    assert torch.equal(device.stored(), host.stored())


def test_between_new_pages_every_address_stays(tiny_config):
    """What a captured graph of a step would hold: the same tensors in every launch but those of the token itself."""
    device = Driven(tiny_config, "tokens, sinks", "triton")
    device.feed(75)
    found = []
    for _ in range(3):
        device.feed(1)
        step = device.store.step
        state, exact = step.counters.state, step.exact
        held = [step.table, step.pages.table, exact.keys, exact.values, exact.sink_keys, state.counters, state.lengths]
        held += [launch.args[n] for launch in (*step._appends.values(),) for n in range(2, 12)]
        held += [arg for _, _, *launches in step._attends.values() for one in launches for arg in one.args[1:]]
        held += [out for _, out, *_ in step._attends.values()]
        found.append([x.data_ptr() for x in held if isinstance(x, torch.Tensor)])
    assert found[0] == found[1] == found[2]
    assert len(found[0]) > 25


@torch.no_grad()
@pytest.mark.parametrize("name", ["tokens, sinks", "rotated"])
def test_a_step_that_packs_nothing_makes_no_tensor(tiny_config, monkeypatch, name):
    """From keys, values and queries to the output: no operator gives memory that was not there. The first step, which
    makes what the others use, is the control."""
    monkeypatch.setitem(RECIPES, "rotated", ("quarot4", {"tokens.window": 8}))
    device = Driven(tiny_config, name, "triton")
    device.feed(75)
    given = [[device.draw(heads, 1) for heads in (KV_HEADS, KV_HEADS, KV_HEADS * GROUP)] for _ in range(4)]
    made, outs = [], []
    tokens = itertools.chain(*given)
    monkeypatch.setattr(device, "draw", lambda *_: next(tokens))
    for _ in given:
        with Allocations(monkeypatch) as seen:
            outs.append(device.feed(1))
        made.append(seen.found)
    assert made[0]
    assert made[1:] == [[], [], []]
    assert len({out.data_ptr() for out in outs}) == 1


def test_results_that_gradients_may_need_are_not_overwritten(tiny_config):
    device = Driven(tiny_config, "tokens, sinks", "triton")
    device.feed(75)
    outs = [device.feed(1) for _ in range(3)]
    assert len({out.data_ptr() for out in outs}) == 3


class Allocations(TorchDispatchMode):
    """The operators whose results lie in memory that none of their arguments has; kernels, interpreted, left out."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.found: list[str] = []
        run = Launch.run

        def unseen(launch, *first):
            with _disable_current_modes():
                run(launch, *first)

        monkeypatch.setattr(Launch, "run", unseen)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        before = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.numel() and x.untyped_storage().data_ptr() not in before:
                self.found.append(str(func))
        return result


def test_layers_share_counters_and_what_differs_does_not(tiny_config):
    """Two layers of one forward move one set of counters; a layer that is elsewhere has its own."""
    first, second = (Driven(tiny_config, "tokens, sinks", "triton") for _ in range(2))
    second.context = second.layer.context = first.context
    for driven in (first, second):
        driven.feed(20)
    for _ in range(2):
        for driven in (first, second):
            driven.feed(1)
    assert first.store.step.counters is second.store.step.counters
    assert first.store.step.counters.steps == 2
    second.feed(2)
    second.feed(1)
    assert first.store.step.counters is not second.store.step.counters
