"""Pack, append, unpack and rotation: the bytes of the kernels are the bytes of the reference."""

import pytest
import torch

from kvq.bench.samples import layout_of, random_pages
from kvq.kernels.append import DecodeState, ExactStore, append_tokens
from kvq.kernels.hadamard import hadamard
from kvq.kernels.packing import Rotation, Source, pack_tokens, unpack_pages
from kvq.pages.flush import FlushRule
from kvq.pages.pages import Pages

LAYOUTS = [
    ("4", "4", 64),
    ("2", "2", 64),
    ("2c32", "2/32", 64),
    ("3", "8", 80),
    ("3c64", "e4m3", 64),
    ("4/16", "4c32", 96),
]


def empty(layout, rows: int, heads: int, pages: int, device) -> Pages:
    pool = torch.zeros(rows * pages, heads, layout.record_bytes, dtype=torch.uint8, device=device)
    table = torch.arange(rows * pages, dtype=torch.int32, device=device).flip(0).view(rows, pages)
    scales = {"key_scale": 0.02, "value_scale": 0.03}
    scales = {name: value for name, value in scales.items() if layout.side(name[:-6]).format == "e4m3"}
    return Pages.of(layout, pool, table, value_limit=torch.zeros(heads, device=device), **scales)


def source_of(x: torch.Tensor, ranges: list[tuple[int, int]]) -> Source:
    made = torch.tensor(ranges, dtype=torch.int32, device=x.device)
    return Source(x=x, ranges=made, offsets=-made[:, 0].contiguous(), longest=max(b - a for a, b in ranges))


@pytest.mark.parametrize(("key", "value", "head_dim"), LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bulk_packing_gives_the_bytes_of_the_reference(key, value, head_dim, dtype, device):
    layout = layout_of(key, value, head_dim)
    x = torch.randn(2, 2, 128, head_dim, generator=torch.Generator().manual_seed(0)).to(dtype).to(device)
    x[0, 0, 5] = 1.5
    made = [empty(layout, 2, 2, 2, device) for _ in range(2)]
    for pages, impl in zip(made, ("triton", "reference")):
        for side in ("key", "value"):
            ran = pack_tokens(source_of(x, [(0, 128), (0, 64)]), pages, side, impl=impl)
            assert ran.impl == impl
    assert torch.equal(made[0].pool, made[1].pool)
    assert torch.equal(made[0].value_limit, made[1].value_limit)
    assert made[0].pool.any()


@pytest.mark.parametrize("settings", [{"clip": 0.9}, {"rotation": True}], ids=str)
def test_clip_and_rotation_in_the_pack_kernel(settings, device):
    layout = layout_of("4", "4", 64)
    x = torch.randn(1, 2, 64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    if "rotation" in settings:
        signs = torch.randint(0, 2, (64,), generator=torch.Generator().manual_seed(1)) * 2.0 - 1
        settings = {"rotation": Rotation(block=32, signs=signs.to(device))}
    made = [empty(layout, 1, 2, 1, device) for _ in range(2)]
    for pages, impl in zip(made, ("triton", "reference")):
        pack_tokens(source_of(x, [(0, 64)]), pages, "key", impl=impl, **settings)
    lengths = torch.tensor([64], dtype=torch.int32, device=device)
    dense = [torch.zeros_like(x) for _ in made]
    for pages, out in zip(made, dense):
        unpack_pages(pages, "key", lengths, out, impl="reference")
    # Sums of a rotation come in another order, so that a code may move by one step.
    assert (dense[0] - dense[1]).abs().max() < (1e-6 if "clip" in settings else 0.5)
    assert (dense[0] - dense[1]).abs().mean() < 2e-3


@pytest.mark.parametrize(("key", "value", "head_dim"), [LAYOUTS[0], LAYOUTS[2], LAYOUTS[4]], ids=str)
def test_appending_token_by_token_gives_the_bytes_of_bulk_packing(key, value, head_dim, device):
    """Pages, rings and sinks after 200 steps' worth of tokens; keys flush in blocks where they are per channel."""
    layout = layout_of(key, value, head_dim)
    unit = layout.key.group if layout.key.axis == "channel" else 1
    rules = {
        "key": FlushRule(window=unit, unit=unit) if unit > 1 else FlushRule(window=5),
        "value": FlushRule(window=5),
    }
    x = torch.randn(2, 2, 140, head_dim, generator=torch.Generator().manual_seed(0)).to(device)
    pages = empty(layout, 2, 2, 3, device)
    state = DecodeState(
        batch=2, sinks=2, **rules, most_new=4, device=device, impl="triton" if device.type == "cuda" else "reference"
    )
    store = ExactStore.empty(state, heads=2, head_dim=head_dim, dtype=x.dtype)
    # A prompt of 120 and of 70 tokens, then steps of one to four tokens.
    stored = torch.tensor([120, 70])
    state.start(stored)
    body = {side: state.counters[:, 3 if side == "key" else 5].tolist() for side in rules}
    for side, ring, sinks in (("key", store.keys, store.sink_keys), ("value", store.values, store.sink_values)):
        pack_tokens(source_of(x[:, :, 2:], [(0, n) for n in body[side]]), pages, side, impl="reference")
        for b in range(2):
            sinks[b] = x[b, :, :2]
            for t in range(body[side][b], int(stored[b]) - 2):
                ring[b, :, t % ring.shape[2]] = x[b, :, 2 + t]
    for new in (1, 3, 4, 1, 2, 1):
        state.advance(new)
        fresh = torch.stack([x[b, :, n : n + new] for b, n in enumerate(state.counters[:, 0].tolist())])
        assert append_tokens(fresh, fresh, store, pages, state, impl="triton").impl == "triton"
    want = empty(layout, 2, 2, 3, device)
    for side, column in (("key", 3), ("value", 5)):
        done = state.counters[:, column].tolist()
        assert done != body[side]
        pack_tokens(source_of(x[:, :, 2:], [(0, n) for n in done]), want, side, impl="reference")
    for side, column in (("key", 3), ("value", 5)):
        lengths = state.counters[:, column].contiguous()
        dense = [torch.zeros(2, 2, 192, head_dim, device=device) for _ in range(2)]
        for made, out in zip((pages, want), dense):
            unpack_pages(made, side, lengths, out, impl="reference")
        assert torch.equal(*dense)
        assert dense[0].any()
    assert torch.equal(pages.value_limit, want.value_limit)
    for b in range(2):
        total, packed = state.counters[b, 1] - 2, state.counters[b, 5]
        for t in range(int(packed), int(total)):
            assert torch.equal(store.values[b, :, t % store.values.shape[2]], x[b, :, 2 + t])


@pytest.mark.parametrize(
    ("key", "value", "head_dim"), [*LAYOUTS, ("book4", "nf4", 64), ("book2", "mx4", 64), ("2s", "book3", 128)], ids=str
)
def test_unpacking_gives_the_numbers_of_the_reference(key, value, head_dim, device):
    layout = layout_of(key, value, head_dim)
    lengths = torch.tensor([64, 192], dtype=torch.int32, device=device)
    pages = random_pages(layout, lengths.tolist(), 2, device=device, factor=True)
    for side in ("key", "value"):
        found, want = (torch.full((2, 2, 200, head_dim), -7.0, device=device) for _ in range(2))
        assert unpack_pages(pages, side, lengths, found, impl="triton").impl == "triton"
        unpack_pages(pages, side, lengths, want, impl="reference")
        assert torch.allclose(found, want, rtol=1e-6, atol=1e-6)
        assert (found[0, :, 64:] == -7).all()


@pytest.mark.parametrize("block", [16, 64, 128])
@pytest.mark.parametrize("inverse", [False, True])
def test_the_hadamard_kernel(block, inverse, device):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, 128, generator=generator).to(device)
    rotation = Rotation(block=block, signs=(torch.randint(0, 2, (128,), generator=generator) * 2.0 - 1).to(device))
    found, ran = hadamard(x, rotation, inverse=inverse, impl="triton")
    assert ran.impl == "triton"
    # From its definition, entry by entry.
    i = torch.arange(block)
    entries = torch.tensor([[(-1.0) ** bin(int(a & b)).count("1") for b in i] for a in i], dtype=torch.float64)
    matrix = torch.block_diag(*[entries / block**0.5] * (128 // block)).to(device)
    signs = rotation.signs.double()
    want = (x.double() @ matrix) * signs if inverse else (x.double() * signs) @ matrix
    assert (found.double() - want).abs().max() < 1e-5
    back, _ = hadamard(found, rotation, inverse=not inverse, impl="triton")
    assert (back - x).abs().max() < 1e-5
