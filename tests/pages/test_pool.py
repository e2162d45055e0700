"""Pages in memory that somebody else allocated: read and written like owned ones, and not a byte beside them."""

import copy
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvq.bench.samples import layout_of
from kvq.codecs import AffineCodec, Float8Codec, codec_spec
from kvq.errors import CacheError
from kvq.kernels.cpp import build, launch
from kvq.kernels.cpp.sides import sides_of
from kvq.kernels.decode_attention import decode_attention
from kvq.kernels.decode_attention.decode_plan import DecodePlan
from kvq.kernels.pack import pack_tokens
from kvq.kernels.types import Query, Source
from kvq.pages.layout import SIDES, PageLayout
from kvq.pages.pages import Encoded, Pages
from kvq.pages.pool import Pool

HEADS, ROWS, TOKENS, HEAD_DIM = 2, 2, 150, 64
# As fp16 and as e4m3 NaN, as an index out of range.
POISON = 0x7F


def affine(bits, axis, group, **more):
    return AffineCodec(bits=bits, axis=axis, group=group, head_dim=HEAD_DIM, **more)


def outliers(**more):
    spec = codec_spec("affine", bits=2, axis="token", group=32, outliers={"share": 0.04, "along": "token"}, **more)
    return spec.build(HEAD_DIM, {}, HEADS)


CODECS = {
    "int4": (affine(4, "token", 64), affine(2, "token", 32)),
    "three bits": (affine(3, "token", 64), affine(8, "token", 16)),
    "kivi": (affine(2, "channel", 32), affine(2, "token", 32)),
    "fp8": (Float8Codec(head_dim=HEAD_DIM, scale=0.02), Float8Codec(head_dim=HEAD_DIM, scale=0.03)),
    "shared record": (outliers(norm={"over": "token"}), outliers()),
}


def layout_of_codecs(key, value) -> PageLayout:
    size = max(key.page_tokens, value.page_tokens)
    return PageLayout(key=key.layout(size), value=value.layout(size))


class Lender:
    """An engine: one buffer, of which every 2nd part of every page is somebody else's, and tables of its own."""

    def __init__(self, layout: PageLayout, kind: str, pages: int = 16):
        size = layout.page_bytes(HEADS)
        if kind == "bytes":
            # Odd numbers of 16 bytes before the first page and between two.
            self.memory = torch.full(((size + 48) * pages + 80,), POISON, dtype=torch.uint8)
            self.pool = Pool.borrow(self.memory, layout, HEADS, stride=size + 48, offset=80)
            starts = [80 + i * (size + 48) for i in range(pages)]
        else:
            # [blocks, layers, heads, tokens, numbers of a token] of the model's dtype, and the pool of layer 1.
            content = -(-size // (HEADS * layout.page_tokens * 2))
            room = HEADS * layout.page_tokens * content * 2
            whole = torch.full((pages, 3, room), POISON, dtype=torch.uint8)
            self.memory = whole.flatten()
            engine = whole.view(torch.bfloat16).view(pages, 3, HEADS, layout.page_tokens, content)
            self.pool = Pool.borrow(engine[:, 1], layout, HEADS)
            starts = [(3 * i + 1) * room for i in range(pages)]
        self.inside = torch.zeros(self.memory.numel(), dtype=torch.bool)
        for start in starts:
            self.inside[start : start + size] = True
        order = torch.randperm(pages, generator=torch.Generator().manual_seed(3))
        need = -(-TOKENS // layout.page_tokens)
        self.tables = [order[i * need : (i + 1) * need].int().view(1, need) for i in range(2 * ROWS)]
        self.used = order[: 2 * ROWS * need].tolist()

    def users(self):
        """Tables of two users of the same pool, [ROWS, pages] each."""
        return torch.cat(self.tables[:ROWS]), torch.cat(self.tables[ROWS:])

    def untouched(self) -> bool:
        others = [page for page in range(self.pool.pages) if page not in self.used]
        return bool((self.memory[~self.inside] == POISON).all() and (self.pool.base[others] == POISON).all())


def owned(layout: PageLayout) -> Pages:
    pool, need = Pool(layout, HEADS), -(-TOKENS // layout.page_tokens)
    ids = pool.allocate(ROWS * need)
    return Pages(pool=pool, ids=[ids[row::ROWS] for row in range(ROWS)])


def tokens(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {side: torch.randn(ROWS, HEADS, TOKENS, HEAD_DIM, generator=generator) * 2 + 0.5 for side in SIDES}


def counts(codec) -> int:
    """Tokens that whole blocks of a codec make up."""
    return TOKENS // codec.block_tokens * codec.block_tokens


def fill(pages: Pages, codecs, x) -> None:
    """A prompt of 70 tokens, then single tokens and a few at once; blocks for codecs of blocks."""
    for side, codec in zip(SIDES, codecs, strict=True):
        unit, start = codec.block_tokens, 0
        for step in (70, 1, 3, 60, 1, 1, 14):
            stop = min(counts(codec), start + -(-step // unit) * unit)
            if stop > start:
                pages.write(side, start, codec.encode(x[side][:, :, start:stop]))
            start = stop
        assert start == counts(codec)


def products(pages: Pages, codecs) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    q = torch.randn(ROWS, HEADS, 3, HEAD_DIM, generator=generator)
    found = []
    for side, codec in zip(SIDES, codecs, strict=True):
        own, count = pages_with(pages, counts(codec)), counts(codec)
        p = torch.rand(ROWS, HEADS, 3, count, generator=generator)
        padded = torch.nn.functional.pad(p, (0, -count % pages.layout.page_tokens))
        found.append(codec.scores(own, side, q)[..., :count])
        found.append(codec.weighted_sum(own, side, padded))
        found.append(codec.dequantized(own, side, torch.float32)[:, :, :count])
        found.append(own.codes(side)[:, :, :count])
    return found


def pages_with(pages: Pages, count: int) -> Pages:
    own = pages.part(0, -(-count // pages.layout.page_tokens))
    return own if pages.pool.owned else Pages(pool=own.pool, ids=own.ids, tokens=count)


@pytest.mark.parametrize("kind", ["bytes", "engine"])
@pytest.mark.parametrize("name", CODECS)
def test_torch_reads_and_writes_borrowed_pages_like_owned_ones(name, kind):
    codecs = CODECS[name]
    layout = layout_of_codecs(*codecs)
    lender = Lender(layout, kind)
    for seed, table in enumerate(lender.users()):
        fill(Pages(pool=lender.pool, numbers=table), codecs, tokens(seed))
    for seed, table in enumerate(lender.users()):
        mine = owned(layout)
        fill(mine, codecs, tokens(seed))
        for found, want in zip(
            products(Pages(pool=lender.pool, numbers=table), codecs), products(mine, codecs), strict=True
        ):
            assert torch.equal(found, want)
    assert lender.untouched()


def test_what_goes_beside_a_page_or_to_another_table_is_seen():
    """Negative control of the test above."""
    codecs = CODECS["int4"]
    layout = layout_of_codecs(*codecs)
    lender = Lender(layout, "bytes")
    first, second = lender.users()
    fill(Pages(pool=lender.pool, numbers=first), codecs, tokens(0))
    assert lender.untouched()
    good = products(Pages(pool=lender.pool, numbers=first), codecs)
    swapped = products(Pages(pool=lender.pool, numbers=first.flip(0)), codecs)
    assert not torch.equal(good[0], swapped[0])
    page = copy.deepcopy(lender.memory)
    lender.pool.base[second[0, 0]].fill_(1)
    assert lender.untouched()
    lender.memory.copy_(page)
    lender.memory[lender.inside.nonzero()[-1] + 1] = 1
    assert not lender.untouched()


def test_what_nobody_wrote_reads_as_zero_weight():
    """Without the number of tokens, the garbage of a page that is filled in part comes through."""
    codecs = CODECS["int4"]
    lender = Lender(layout_of_codecs(*codecs), "bytes")
    pages = Pages(pool=lender.pool, numbers=lender.users()[0])
    fill(pages, codecs, tokens(0))
    weights = torch.nn.functional.pad(torch.rand(ROWS, HEADS, 1, TOKENS), (0, -TOKENS % 64))
    assert not codecs[1].weighted_sum(pages, "value", weights).isfinite().all()
    assert codecs[1].weighted_sum(pages_with(pages, TOKENS), "value", weights).isfinite().all()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("int4", torch.bfloat16), ("three bits", torch.float32), ("kivi", torch.bfloat16), ("fp8", torch.float32)],
    ids=str,
)
def test_triton_writes_and_reads_borrowed_pages_like_torch(name, dtype, device):
    key, value = CODECS[name]
    layout = layout_of_codecs(key, value)
    lender = Lender(layout, "bytes")
    first, second = lender.users()
    scales = {f"{side}_scale": float(codec.scale) for side, codec in zip(SIDES, (key, value), strict=True)}
    made = [Pages(pool=lender.pool, numbers=table, **scales) for table in (first, second)]
    x = {side: numbers.to(dtype) for side, numbers in tokens(0).items()}
    length, codecs = TOKENS // 32 * 32, {"key": key, "value": value}
    for pages, impl in zip(made, ("triton", "reference"), strict=True):
        for side in SIDES:
            for start, stop in ((0, 64), (64, 96), (96, length)):
                ranges = torch.tensor([[start, stop]] * ROWS, dtype=torch.int32)
                zero = torch.zeros(ROWS, dtype=torch.int32)
                source = Source(x=x[side], ranges=ranges, offsets=zero, longest=stop - start)
                pack_tokens(source, pages, side, codecs[side], impl=impl)
    assert lender.untouched()
    for side in SIDES:
        for page in zip(first.flatten().tolist(), second.flatten().tolist(), strict=True):
            words = [lender.pool.part(number, layout.places[side, "words"]) for number in page]
            assert torch.equal(*words)
    codes = [pages_with(pages, length).codes("key")[:, :, :length] for pages in made]
    assert torch.equal(codes[0], key.encode(x["key"][:, :, :length]).codes)
    lengths = torch.full((ROWS,), length, dtype=torch.int32)
    q = torch.randn(ROWS, HEADS * 2, 1, HEAD_DIM, generator=torch.Generator().manual_seed(5))
    plan = DecodePlan(layout, batch=ROWS, heads=HEADS, group=2, device=device, slots=8, impl="triton")
    plan.update(lengths)
    out = decode_attention(Query(q=q, scale=0.1), made[0], lengths, plan, impl="triton").out
    stored = [codec.dequantized(pages_with(made[1], length), side, torch.float64)[:, :, :length]
              for side, codec in zip(SIDES, (key, value), strict=True)]  # fmt: skip
    scores = q.double().unflatten(1, (HEADS, 2)) @ stored[0].unsqueeze(2).transpose(-1, -2) * 0.1
    want = (scores.softmax(-1) @ stored[1].unsqueeze(2)).flatten(1, 2)
    assert (out.double() - want).norm() < 1e-3 * want.norm()


@pytest.mark.skipif(build.unavailable() is not None, reason=f"{build.unavailable()}")
@pytest.mark.parametrize("name", ["three bits", "kivi", "fp8"])
def test_the_cpu_kernels_write_and_read_borrowed_pages_like_owned_ones(name):
    codecs = CODECS[name]
    layout = layout_of_codecs(*codecs)
    lender, mine = Lender(layout, "engine"), owned(layout)
    made = [Pages(pool=lender.pool, numbers=lender.users()[0]), mine]
    sides = sides_of(dict(zip(SIDES, codecs, strict=True)), layout)
    x, count = tokens(0), min(map(counts, codecs))
    for pages in made:
        for side, codec in zip(SIDES, codecs, strict=True):
            unit = codec.block_tokens
            for start, stop in itertools.pairwise([0, 64, 64 + unit, count]):
                assert launch.pack(x[side][:, :, start:stop], pages, sides[side], start)
    assert lender.untouched()
    empty = torch.empty(ROWS, HEADS, 1, HEAD_DIM)
    q = torch.randn(ROWS, HEADS, 2, 1, HEAD_DIM, generator=torch.Generator().manual_seed(5))
    read = torch.tensor([[count, count, count, 0, count, 0, 0]] * ROWS, dtype=torch.int32)
    found = [launch.decode_attention(q, pages, sides, read, (empty, empty))[0] for pages in made]
    assert torch.equal(*found)
    assert found[0].isfinite().all()
    # The bytes are those of the codecs.
    for side, codec in zip(SIDES, codecs, strict=True):
        own = pages_with(made[0], count)
        assert torch.equal(own.codes(side)[:, :, :count], codec.encode(x[side][:, :, :count]).codes)


@pytest.fixture
def device():
    from kvq.kernels.dispatch import interpreted, triton_version

    if triton_version() is None or not interpreted():
        pytest.skip("this test has its tensors on the CPU, where Triton's interpreter runs")
    return torch.device("cpu")


def test_what_a_borrowed_pool_refuses():
    layout = layout_of("4", "4", HEAD_DIM)
    size = layout.page_bytes(HEADS)
    memory = torch.zeros(4 * size + 64, dtype=torch.uint8)
    pool = Pool.borrow(memory, layout, HEADS)
    for refused in (
        lambda: pool.allocate(1),
        lambda: pool.share([0]),
        lambda: pool.release([0]),
        lambda: pool.to(torch.device("cpu")),
    ):
        with pytest.raises(CacheError, match="borrowed memory"):
            refused()
    with pytest.raises(CacheError, match="page 4 is not among the 4"):
        pool.records(4)
    with pytest.raises(CacheError, match="multiples of 16"):
        Pool.borrow(memory, layout, HEADS, stride=size + 8)
    with pytest.raises(CacheError, match="multiples of 16"):
        Pool.borrow(memory, layout, HEADS, offset=2)
    with pytest.raises(CacheError, match="do not hold a page"):
        Pool.borrow(memory, layout, HEADS, stride=size - 16)
    with pytest.raises(CacheError, match="do not hold a page"):
        Pool.borrow(memory.view(-1, 64), layout, HEADS)
    with pytest.raises(CacheError, match="not contiguous"):
        Pool.borrow(torch.zeros(2, 64, size).transpose(1, 2), layout, HEADS)
    assert pool.nbytes == 0
    assert Pool(layout, HEADS).nbytes == 0


def test_an_owned_pool_grows_and_uses_released_pages_again():
    layout = layout_of("4", "4", HEAD_DIM)
    pool = Pool(layout, HEADS)
    first, second = pool.allocate(3), pool.allocate(5)
    assert sorted([*first, *second]) == list(range(8))
    kept = pool.slabs[0].data_ptr()
    pool.records(second[0]).fill_(7)
    assert pool.slabs[0].data_ptr() == kept
    pool.records(first[1]).fill_(7)
    pool.release([second[0], first[1]])
    taken = pool.allocate(2)
    assert taken == [first[1], second[0]]
    assert not any(pool.records(page).any() for page in taken)
    assert pool.nbytes == 8 * layout.page_bytes(HEADS)
    # Kernels find every page from the first slab's start.
    starts = pool.base.data_ptr() + pool.numbers(list(range(8))) * pool.unit
    assert starts.tolist() == pool.addresses(list(range(8))).tolist()


def test_a_page_is_free_and_zero_when_its_last_reader_is_gone():
    pool = Pool(layout_of("4", "4", HEAD_DIM), HEADS)
    ids = [*pool.allocate(3), *pool.allocate(3)]
    assert pool.readers[ids].tolist() == [1] * 6
    for page in ids:
        pool.records(page).fill_(7)
    pool.share([ids[0], ids[4], ids[0]])
    assert pool.readers[ids].tolist() == [3, 1, 1, 1, 2, 1]
    pool.release([ids[0], ids[1], ids[4], ids[5], ids[0]])
    assert pool.readers[ids].tolist() == [1, 0, 1, 1, 1, 0]
    assert [bool(pool.records(page).any()) for page in ids] == [True, False, True, True, True, False]
    assert pool.allocate(2) == [ids[1], ids[5]]


def test_a_copy_takes_over_one_reader():
    pool = Pool(layout_of("4", "4", HEAD_DIM), HEADS)
    (page,) = pool.allocate(1)
    pool.records(page).fill_(7)
    pool.share([page])
    copy = pool.copy_page(page)
    assert copy != page
    assert pool.readers[[page, copy]].tolist() == [1, 1]
    pool.records(page).fill_(1)
    assert (pool.records(copy) == 7).all()


class Operators(TorchDispatchMode):
    """Counts operators."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CODECS)
def test_tokens_of_all_rows_are_written_at_once(name):
    """Rows of one length cost the operators of one row where their pages are neighbours; anywhere, the bytes are those
    of rows that are written one by one."""
    codecs = dict(zip(SIDES, CODECS[name], strict=True))
    layout = layout_of_codecs(*CODECS[name])
    x = torch.randn(4, HEADS, 96, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    for ids in ([0, 1, 2, 3], [5, 0, 3, 2]):
        together, apart = owned(layout).pool, owned(layout).pool
        for side, codec in codecs.items():
            unit = codec.block_tokens
            for start, stop in ((0, 32), (32, 32 + unit)):
                encoded = codec.encode(x[:, :, start:stop])
                Pages(pool=together, ids=[[page] for page in ids]).write(side, start, encoded)
                for row, page in enumerate(ids):
                    own = codec.encode(x[row : row + 1, :, start:stop])
                    Pages(pool=apart, ids=[[page]]).write(side, start, own)
        assert torch.equal(together.slabs[0], apart.slabs[0])
        assert together.slabs[0].any()
    pool, counts = owned(layout).pool, []
    encoded = CODECS[name][1].encode(x[:, :, :1])
    for rows in (1, 4):
        own = Encoded(codes=encoded.codes[:rows], sections={n: part[:rows] for n, part in encoded.sections.items()})
        with Operators() as operators:
            Pages(pool=pool, ids=[[page] for page in range(rows)]).write("value", 7, own)
        counts.append(operators.count)
    assert counts[0] == counts[1] > 0
