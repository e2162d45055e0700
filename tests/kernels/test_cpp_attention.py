"""The C++ kernel against softmax over dequantized tensors in fp64, on the same codes."""

import itertools

import pytest
import torch

from kvq.codecs import AffineCodec, Float8Codec
from kvq.kernels.cpp import build, launch
from kvq.kernels.cpp.sides import sides_of, sides_of_pages
from kvq.pages.layout import PageLayout, Section, SideLayout
from kvq.pages.pages import Pages
from kvq.pages.pool import Pool

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=f"{build.unavailable()}")

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
        self.pool = Pool(self.layout, HEADS)
        self.body, self.packed, self.codecs = body, packed, {"key": key, "value": value}
        # Two slabs, pages out of order.
        first, second = self.pool.allocate(3), self.pool.allocate(max(1, -(-max(packed) // size) - 3))
        self.table = [*reversed(first), *second][: -(-max(packed) // size)]
        self.seen, self.exact, self.sinks = {}, [], []
        for i, (side, count) in enumerate(zip(("key", "value"), packed)):
            x = normal(1, HEADS, body, key.head_dim, seed=i, scale=2.0)
            whole = -(-count // size) * size
            filled = torch.cat([x[:, :, :count], x[:, :, :1].expand(-1, -1, whole - count, -1)], dim=2)
            if count:
                encoded = self.codecs[side].encode(filled)
                Pages(pool=self.pool, ids=[self.table]).write(side, 0, encoded)
                stored = self.codecs[side].decode(encoded, torch.float64)[:, :, :count]
            else:
                stored = x[:, :, :0]
            sink = normal(HEADS, sinks, key.head_dim, seed=8 + i)
            self.seen[side] = torch.cat([sink, stored[0], x[0, :, count:]], dim=1)
            self.sinks.append(sink)
            # What precedes the exact tokens at hand is never read.
            junk = torch.full((HEADS, exact_extra, key.head_dim), torch.nan, dtype=torch.float64)
            self.exact.append(torch.cat([junk, x[0, :, count:]], dim=1))
        self.sides = sides_of(self.codecs, self.layout)
        self.q = normal(HEADS, QUERIES, key.head_dim, seed=20, scale=0.3)

    def pages(self):
        scales = {f"{side}_scale": getattr(codec, "scale", 1.0) for side, codec in self.codecs.items()}
        return Pages(pool=self.pool, ids=[self.table], **scales)

    def counts(self, queries=1):
        """Exact tokens are right-aligned in their buffers."""
        sinks = self.sinks[0].shape[1]
        offsets = [x.shape[1] - self.body for x in self.exact]
        offsets = [offset % x.shape[1] for offset, x in zip(offsets, self.exact)]
        return torch.tensor(
            [[*self.packed, self.body, sinks, sinks + self.body - queries, *offsets]], dtype=torch.int32
        )

    def found(self, dtype=torch.float64, **settings):
        return self.attended(dtype, **settings)[0]

    def attended(self, dtype=torch.float64, **settings):
        exact, sinks = ([x.to(dtype).unsqueeze(0) for x in pair] for pair in (self.exact, self.sinks))
        if settings.get("bias") is not None:
            settings["bias"] = settings["bias"].unsqueeze(0)
        q = self.q.to(dtype).view(1, HEADS, QUERIES, 1, -1)
        out, lse = launch.decode_attention(q, self.pages(), self.sides, self.counts(), exact, sinks, **settings)
        return out[0, :, :, 0], lse[0, :, :, 0]

    def expected(self, softcap=None, sink_logits=None, bias=None):
        scores = self.q @ self.seen["key"].transpose(-1, -2)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if bias is not None:
            scores = scores + bias
        if sink_logits is not None:
            scores = torch.cat([scores, sink_logits.unsqueeze(-1)], dim=-1)
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


def test_softcap_sink_logits_sinks_and_masks():
    case = Case(affine(4, "channel", 32, 64), affine(4, "token", 32, 64))
    sink_logits = normal(HEADS, QUERIES, seed=30)
    bias = torch.zeros(case.body + 5, dtype=torch.float64)
    bias[[0, 7, 100, 330]] = -torch.inf
    for settings in ({"softcap": 3.0}, {"sink_logits": sink_logits}, {"bias": bias}):
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


def test_rows_of_a_batch_are_those_of_calls_of_their_own():
    """Rows of different lengths and packed counts share a call; a table is as wide as the longest needs."""
    key, value = affine(2, "channel", 32, 64), affine(4, "token", 32, 64)
    cases = [Case(key, value), Case(key, value, body=70, packed=(64, 0)), Case(key, value, 1500, (1408, 1437))]
    for seed, case in enumerate(cases):
        case.q = normal(HEADS, QUERIES, 64, seed=40 + seed)
    first = cases[0].pages()
    width = max(case.pages().table.shape[1] for case in cases)
    tables = [case.pages().table * 16 + case.pool.base.data_ptr() - first.pool.base.data_ptr() for case in cases]
    table = torch.cat([torch.nn.functional.pad(t, (0, width - t.shape[1])) for t in tables]) // 16
    pages = Pages(pool=first.pool, numbers=table)
    counts, exact = torch.cat([case.counts() for case in cases]), []
    for side in range(2):
        room = max(case.exact[side].shape[1] for case in cases)
        rows = [
            torch.nn.functional.pad(case.exact[side], (0, 0, room - case.exact[side].shape[1], 0)) for case in cases
        ]
        exact.append(torch.stack(rows))
        counts[:, 5 + side] = torch.tensor([(room - case.body) % room for case in cases])
    sinks = [torch.stack([case.sinks[side] for case in cases]) for side in range(2)]
    q = torch.stack([case.q for case in cases]).unsqueeze(3)
    found, _ = launch.decode_attention(q, pages, cases[0].sides, counts, exact, sinks)
    for case, own in zip(cases, found):
        assert torch.equal(own[:, :, 0], case.found()) or worst(own[:, :, 0], case.expected()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_exact_tokens_are_read_in_their_own_dtype(dtype):
    case = Case(affine(4, "token", 32, 64), affine(4, "token", 32, 64), packed=(0, 0))
    for pair in (case.exact, case.sinks):
        pair[:] = [x.to(dtype).double() for x in pair]
    exact, sinks = ([x.to(dtype).unsqueeze(0) for x in pair] for pair in (case.exact, case.sinks))
    q = case.q.view(1, HEADS, QUERIES, 1, -1)
    found, _ = launch.decode_attention(q, case.pages(), case.sides, case.counts(), exact, sinks)
    assert torch.equal(found[0, :, :, 0], case.found())


@pytest.mark.parametrize("window", [None, 3, 40, 200])
def test_several_queries_see_what_is_not_after_them_and_in_their_window(window):
    case, L = Case(affine(2, "channel", 32, 64), affine(4, "token", 32, 64)), 4
    q = normal(HEADS, QUERIES, L, 64, seed=50)
    exact, sinks = ([x.unsqueeze(0) for x in pair] for pair in (case.exact, case.sinks))
    found, lse = launch.decode_attention(
        q.unsqueeze(0), case.pages(), case.sides, case.counts(L), exact, sinks, window=window
    )
    scores = q @ case.seen["key"].unsqueeze(1).transpose(-1, -2)
    own = case.seen["key"].shape[1] - L + torch.arange(L).unsqueeze(1)
    token = torch.arange(scores.shape[-1])
    hidden = (token > own) | (token <= own - (window or 10**6))
    scores = scores.masked_fill(hidden, -torch.inf)
    assert worst(found[0], scores.softmax(-1) @ case.seen["value"].unsqueeze(1)) < 1e-12
    assert torch.allclose(lse[0], scores.logsumexp(-1), rtol=1e-12)


def test_a_query_that_sees_nothing_is_zero():
    case = Case(affine(2, "channel", 32, 64), affine(4, "token", 32, 64))
    out, lse = case.attended(bias=torch.full((case.body + 5,), -torch.inf, dtype=torch.float64))
    assert not out.any()
    assert (lse == -torch.inf).all()


def test_a_wrong_page_is_seen():
    case = Case(affine(4, "channel", 32, 64), affine(4, "token", 32, 64))
    case.table[1] = case.table[0]
    assert worst(case.found(), case.expected()) > 1e-2


def test_pages_that_say_all_are_read_by_their_layout_alone():
    case = Case(affine(2, "channel", 32, 64), Float8Codec(head_dim=64, scale=0.5))
    expected = case.found()
    case.sides = sides_of_pages(case.pages())
    assert torch.equal(case.found(), expected)
    more = SideLayout(
        format="affine", bits=2, head_dim=64, page_tokens=64, group=32, extras=(Section(name="norm", shape=()),)
    )
    pages = Pages(pool=Pool(PageLayout(key=case.layout.key, value=more), 1), ids=[[]])
    assert "more than codes and scales" in sides_of_pages(pages)["value"]


def test_groups_that_are_no_atoms_are_refused():
    codec = affine(4, "token", 8, 64)
    layout = PageLayout(key=codec.layout(64), value=codec.layout(64))
    assert "groups of 8 channels" in sides_of({"key": codec, "value": codec}, layout)["key"]
