"""The compiled CPU kernel against softmax over dequantized tensors in fp64, on the same codes."""

import itertools

import pytest
import torch

pytest.importorskip("numba", reason="the compiled kernel needs numba")

from kvq.cache.arena import Arena
from kvq.codecs import AffineCodec, Float8Codec
from kvq.kernels import cpu
from kvq.pages.layout import PageLayout, Section, SideLayout

HEADS, QUERIES = 2, 3


def affine(bits, axis, group, head_dim):
    return AffineCodec(bits=bits, axis=axis, group=group, head_dim=head_dim)


def pairs():
    """Codecs of keys and values: every width, both axes, groups wider and narrower than a plane, odd head sizes."""
    for bits, head_dim in itertools.product((2, 3, 4, 8), (16, 64, 80, 128)):
        yield affine(bits, "channel", 32, head_dim), affine(bits, "token", 16, head_dim)
        yield affine(bits, "token", head_dim, head_dim), affine(bits, "channel", 16, head_dim)
    yield Float8Codec(head_dim=48, scale=0.03), Float8Codec(head_dim=48, scale=0.5)
    yield affine(2, "channel", 128, 64), Float8Codec(head_dim=64)


def normal(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


class Case:
    """One row: tokens in pages up to a count per side, the others exact, sinks before them."""

    def __init__(self, key, value, body=331, packed=(256, 192), sinks=5, exact_extra=7):
        size = max(key.page_tokens, value.page_tokens)
        self.layout = PageLayout(key=key.layout(size), value=value.layout(size))
        self.arena = Arena(self.layout, HEADS, torch.device("cpu"))
        self.body, self.packed, self.codecs = body, packed, {"key": key, "value": value}
        # Two slabs, pages out of order.
        first, second = self.arena.allocate(3), self.arena.allocate(max(1, -(-max(packed) // size) - 3))
        self.table = [*reversed(first), *second][: -(-max(packed) // size)]
        self.seen, self.exact, self.sinks = {}, [], []
        for i, (side, count) in enumerate(zip(("key", "value"), packed)):
            x = normal(1, HEADS, body, key.head_dim, seed=i, scale=2.0)
            whole = -(-count // size) * size
            filled = torch.cat([x[:, :, :count], x[:, :, :1].expand(-1, -1, whole - count, -1)], dim=2)
            if count:
                encoded = self.codecs[side].encode(filled)
                self.arena.write_pages(self.table[: whole // size], side, encoded)
                stored = self.codecs[side].decode(encoded, torch.float64)[:, :, :count]
            else:
                stored = x[:, :, :0]
            sink = normal(HEADS, sinks, key.head_dim, seed=8 + i)
            self.seen[side] = torch.cat([sink, stored[0], x[0, :, count:]], dim=1)
            self.sinks.append(sink)
            # What precedes the exact tokens at hand is never read.
            junk = torch.full((HEADS, exact_extra, key.head_dim), torch.nan, dtype=torch.float64)
            self.exact.append(torch.cat([junk, x[0, :, count:]], dim=1))
        self.q = normal(HEADS, QUERIES, key.head_dim, seed=20, scale=0.3)

    def found(self, dtype=torch.float64, **settings):
        scales = tuple(getattr(self.codecs[side], "scale", 1.0) for side in ("key", "value"))
        exact, sinks = (tuple(x.to(dtype) for x in pair) for pair in (self.exact, self.sinks))
        return cpu.decode_row(
            self.q.to(dtype), self.arena.addresses(self.table), self.layout, self.packed, exact, sinks, scales,
            self.body, **settings,
        )  # fmt: skip

    def expected(self, softcap=None, learned=None, bias=None):
        scores = self.q @ self.seen["key"].transpose(-1, -2)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if bias is not None:
            scores = scores + bias
        if learned is not None:
            scores = torch.cat([scores, learned.unsqueeze(-1)], dim=-1)
        weights = scores.softmax(-1)[..., : self.seen["value"].shape[1]]
        return weights @ self.seen["value"]


def worst(found, reference):
    """Largest error of a row relative to that row."""
    return float(((found.double() - reference).norm(dim=-1) / reference.norm(dim=-1)).max())


@pytest.mark.parametrize(("key", "value"), list(pairs()), ids=str)
def test_a_row_is_the_softmax_over_everything_it_holds(key, value):
    case = Case(key, value)
    assert worst(case.found(), case.expected()) < 1e-12
    assert worst(case.found(torch.float32), case.expected()) < 2e-5


@pytest.mark.parametrize(
    ("body", "packed"),
    [(1, (0, 0)), (64, (0, 0)), (65, (64, 64)), (331, (0, 300)), (1500, (1408, 1437)), (128, (128, 1))],
)
def test_any_length_and_any_packed_counts(body, packed):
    case = Case(affine(2, "token", 32, 64), affine(4, "token", 64, 64), body=body, packed=packed)
    assert worst(case.found(), case.expected()) < 1e-12


def test_softcap_learned_sinks_and_masks():
    case = Case(affine(4, "channel", 32, 64), affine(4, "token", 32, 64))
    learned = normal(HEADS, QUERIES, seed=30)
    bias = torch.zeros(case.body + 5, dtype=torch.float64)
    bias[[0, 7, 100, 330]] = -torch.inf
    for settings in ({"softcap": 3.0}, {"learned": learned}, {"bias": bias}):
        assert worst(case.found(**settings), case.expected(**settings)) < 1e-12
        assert worst(case.found(**settings), case.expected()) > 1e-6


def test_one_dominant_token_and_equal_scores():
    case = Case(affine(2, "channel", 32, 64), affine(2, "token", 32, 64))
    case.q *= 1e3
    assert worst(case.found(torch.float32), case.expected()) < 1e-3
    case.q *= 0
    assert worst(case.found(torch.float32), case.expected()) < 1e-5


def test_one_thread_gives_what_two_give():
    case, threads = Case(affine(2, "channel", 32, 64), affine(2, "token", 32, 64), 3000, (2944, 2872)), None
    try:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        alone = case.found()
        torch.set_num_threads(2)
        assert worst(case.found(), alone) < 1e-13
    finally:
        torch.set_num_threads(threads)


def test_a_wrong_page_is_seen():
    case = Case(affine(4, "channel", 32, 64), affine(4, "token", 32, 64))
    case.table[1] = case.table[0]
    assert worst(case.found(), case.expected()) > 1e-2


def test_layouts_with_further_sections_are_left_to_the_reference():
    plain = SideLayout(format="affine", bits=2, head_dim=64, page_tokens=64, group=32)
    more = SideLayout(
        format="affine", bits=2, head_dim=64, page_tokens=64, group=32, extras=(Section(name="norm", shape=()),)
    )
    assert cpu.supports(PageLayout(key=plain, value=plain))
    assert not cpu.supports(PageLayout(key=plain, value=more))
