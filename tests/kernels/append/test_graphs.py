"""A decode step can be captured: the host neither waits for the device nor allocates, and replays follow the device."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvq.bench.samples import codecs_of, layout_of
from kvq.kernels.append import append_tokens
from kvq.kernels.append.decode_state import DecodeState, ExactStore
from kvq.kernels.decode_attention import decode_attention
from kvq.kernels.decode_attention.decode_plan import DecodePlan
from kvq.kernels.decode_attention.reference import dense_attention
from kvq.kernels.types import Query
from kvq.pages.flush import FlushRule
from kvq.pages.pages import Pages

# What reads a number back, has a size that depends on numbers, or takes memory.
FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "empty", "zeros", "ones", "full", "_to_copy", "clone")


class Watched(TorchDispatchMode):
    """Refuses operations of ``FORBIDDEN``."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in FORBIDDEN or name.startswith(("empty", "new_")):
            raise AssertionError(f"{name} in a step that a graph should hold")
        return function(*args, **(kwargs or {}))


class Decoder:
    """One layer's state and the launches of a step."""

    def __init__(self, device: torch.device, stored: list[int], head_dim: int = 64):
        self.layout = layout_of("4", "4", head_dim)
        self.codecs = codecs_of("4", "4", head_dim)
        rows = len(stored)
        pool = torch.zeros(rows * 4, 2, self.layout.record_bytes, dtype=torch.uint8, device=device)
        table = torch.arange(rows * 4, dtype=torch.int32, device=device).view(rows, 4)
        self.pages = Pages.of(self.layout, pool, table)
        rule = FlushRule(window=16)
        self.state = DecodeState(batch=rows, sinks=2, key=rule, value=rule, device=device, impl="triton")
        self.store = ExactStore.empty(self.state, heads=2, head_dim=head_dim, dtype=torch.float32)
        self.state.start(torch.tensor(stored))
        self.plan = DecodePlan(self.layout, batch=rows, heads=2, group=2, device=device, impl="triton")
        self.k, self.v = (torch.zeros(rows, 2, 1, head_dim, device=device) for _ in range(2))
        q = torch.zeros(rows, 4, 1, head_dim, device=device)
        self.out = torch.zeros_like(q)
        self.query = Query(q=q, scale=head_dim**-0.5, positions=self.state.positions)

    def step(self) -> None:
        self.state.advance(1)
        self.plan.update(self.state.lengths)
        append_tokens(self.k, self.v, self.store, self.pages, self.state, self.codecs, impl="triton")
        exact = self.store.exact(self.state)
        decode_attention(self.query, self.pages, self.state.lengths, self.plan, exact, out=self.out, impl="triton")

    def feed(self, generator: torch.Generator) -> None:
        for tensor in (self.k, self.v, self.query.q):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))

    def wanted(self) -> torch.Tensor:
        exact = self.store.exact(self.state)
        return dense_attention(self.query, self.pages, self.state.lengths, exact, torch.float64)[0]


def test_the_host_neither_waits_nor_allocates(device, monkeypatch):
    from kvq.kernels.device.launch import Launch

    ran = []
    monkeypatch.setattr(Launch, "run", lambda self: ran.append(self.kernel))
    decoder = Decoder(device, [40, 20])
    with Watched():
        decoder.step()
    # advance, plan, append, split, exact, merge
    assert len(ran) == 6
    with pytest.raises(AssertionError, match="_local_scalar_dense"), Watched():
        decoder.state.lengths[0].item()


def test_steps_that_only_the_device_counts(device):
    """The same objects step after step, with nothing told to the host: what a replayed graph does."""
    decoder, generator = Decoder(device, [60, 3]), torch.Generator().manual_seed(0)
    for _ in range(3):
        decoder.feed(generator)
        decoder.step()
        want = decoder.wanted()
        assert (decoder.out - want).abs().max() < 2e-3 * want.abs().max()
    assert decoder.state.counters[:, 1].tolist() == [63, 6]


def test_capture_and_replay(device):
    if device.type != "cuda":
        pytest.skip("graphs are captured on CUDA devices")
    decoder, generator = Decoder(device, [60, 3]), torch.Generator().manual_seed(0)
    decoder.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decoder.step()
    for _ in range(40):
        decoder.feed(generator)
        graph.replay()
        torch.cuda.synchronize()
        want = decoder.wanted()
        assert (decoder.out - want).abs().max() < 2e-3 * want.abs().max()
    # Another table, in place.
    pool = decoder.pages.pool.base
    order = torch.randperm(len(pool), generator=generator).to(device)
    moved = pool[order].clone()
    decoder.pages.table.copy_(order.argsort()[decoder.pages.table.long()].int())
    pool.copy_(moved)
    decoder.feed(generator)
    graph.replay()
    torch.cuda.synchronize()
    want = decoder.wanted()
    assert (decoder.out - want).abs().max() < 2e-3 * want.abs().max()
