"""Decode kernels against softmax over dequantized tokens in fp64, on the same codes; what must not be read is NaN."""

from dataclasses import dataclass, field, replace

import pytest
import torch
from made_pages import Counts, random_exact

from kvq.bench.samples import layout_of, random_pages
from kvq.kernels.decode_attention import decode_attention
from kvq.kernels.decode_attention.decode_plan import DecodePlan
from kvq.kernels.decode_attention.reference import dense_attention
from kvq.kernels.types import Query
from kvq.pages.pool import Pool

# Of kernels that multiply fp16 factors and sum in fp32; q and the weights are rounded to 11 bits.
FROBENIUS, WORST_ROW = 1e-3, 4e-3


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call. ``counts``: tokens of each sequence as (packed keys, packed values, all), sinks aside."""

    key: str
    value: str
    counts: tuple = ((70, 70, 75), (0, 0, 0), (193, 193, 193))
    head_dim: int = 64
    page_tokens: int = 64
    heads: int = 2
    group: int = 2
    queries: int = 1
    sinks: int = 0
    settings: dict = field(default_factory=dict)
    slots: int = 8
    spread: float = 1.0
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        shown = [f"k{self.key}-v{self.value}-d{self.head_dim}-g{self.group}-l{self.queries}-p{self.page_tokens}"]
        return "-".join(shown + [str(name) for name in self.settings] + [f"s{self.sinks}"] * bool(self.sinks))


CASES = [
    # Widths of both sides, independently.
    *(Case(key=w, value=w) for w in ("2", "3", "4", "8", "e4m3", "4s", "2s", "book2", "book3", "book4", "nf4", "mx4")),
    Case(key="4", value="2"),
    Case(key="8s", value="e4m3"),
    Case(key="e4m3", value="4/32"),
    Case(key="2c32", value="2/32", counts=((128, 70, 134), (0, 0, 9), (192, 192, 200))),
    Case(key="3c64", value="3", counts=((64, 70, 75), (64, 64, 65), (192, 130, 195))),
    Case(key="4c64", value="4c64", counts=((64, 64, 70), (0, 0, 3), (192, 192, 195))),
    Case(key="4", value="8c32", counts=((70, 64, 75), (1, 0, 1), (192, 192, 195))),
    # Tiers of channels, 0 bits among them; metadata as bytes, with one term, and shared by heads.
    Case(key="4.2.2.2c128r", value="book2", counts=((128, 64, 129), (0, 0, 0), (256, 190, 258)), page_tokens=128),
    Case(key="8.4.3.3c128r", value="book4", counts=((128, 70, 134), (0, 0, 9)), page_tokens=128, head_dim=128),
    Case(
        key="4.2.0.2c64z",
        value="4.0c32",
        counts=((192, 192, 200), (64, 32, 70)),
        page_tokens=128,
        head_dim=128,
        sinks=2,
    ),
    Case(key="2c16r", value="book2", counts=((80, 70, 84), (0, 0, 9), (192, 192, 200))),
    Case(key="4.2c64f", value="4f", counts=((64, 70, 75), (64, 64, 65))),
    Case(key="2c32n", value="2/32z", counts=((64, 70, 75), (0, 0, 9), (192, 192, 200)), spread=0.5),
    Case(key="4c32s", value="4/32sf", counts=((64, 70, 75), (0, 0, 9), (192, 192, 200))),
    Case(key="8st", value="2tn"),
    Case(key="4tn", value="8st"),
    # Levels evenly spaced, read without a table.
    *(Case(key=f"even{n}", value=f"even{n}", head_dim=d) for n, d in ((2, 64), (3, 64), (3, 128), (4, 64))),
    # Head sizes.
    *(Case(key="4", value="4", head_dim=d) for d in (80, 128)),
    *(Case(key="2", value="3", head_dim=d) for d in (96, 256)),
    Case(key="book4", value="e4m3", head_dim=80),
    # What other formats are turned into.
    *(Case(key="dense", value="dense", head_dim=d) for d in (80, 128)),
    Case(key="dense", value="4", counts=((70, 64, 75), (1, 0, 1), (192, 192, 195))),
    # Query heads of a KV head, and query tokens.
    *(Case(key="4", value="4", group=g) for g in (1, 3, 8, 16)),
    Case(key="2c32", value="2/32", group=16, counts=((64, 50, 70), (0, 0, 0), (128, 128, 130))),
    *(Case(key="4", value="2", queries=n, counts=((70, 70, 79), (0, 0, 9), (193, 190, 202))) for n in (2, 8)),
    Case(key="4", value="4", group=8, queries=5, counts=((70, 70, 75), (0, 0, 5), (193, 193, 200))),
    # Pages.
    *(Case(key="4", value="4", page_tokens=p) for p in (32, 256)),
    Case(key="2", value="2", page_tokens=16, head_dim=128),
    # Additions.
    Case(key="4", value="4", settings={"window": 100}, sinks=4),
    Case(key="4", value="4", settings={"window": 7}, queries=3, counts=((70, 70, 75), (0, 0, 3), (193, 193, 196))),
    Case(key="2", value="2", settings={"softcap": 3.0}, sinks=3),
    Case(key="4", value="4", settings={"sink_logits": True}, sinks=1),
    Case(
        key="2c32",
        value="2/32",
        settings={"sink_logits": True, "softcap": 5.0, "window": 90},
        sinks=5,
        queries=2,
        counts=((64, 64, 75), (0, 0, 2), (192, 192, 195)),
    ),
    # Scales over many powers of two.
    Case(key="e4m3", value="4", spread=4.0),
    Case(key="e4m3", value="book2", spread=3.0),
    # 16-bit queries and exact tokens.
    Case(key="4", value="4", dtype=torch.bfloat16, sinks=2),
    Case(key="3", value="2", dtype=torch.float16, sinks=2),
    # Lengths about a tile and a page; many splits.
    Case(key="4", value="4", counts=tuple((n, n, n) for n in (1, 31, 32, 33, 63, 64, 65, 127, 128, 129))),
    Case(key="2", value="2", counts=((1100, 1100, 1100), (40, 40, 45)), slots=64),
]


def setup(case: Case, device: torch.device, seed: int = 0):
    """(query, pages, lengths, plan, exact) of a case."""
    layout = layout_of(case.key, case.value, case.head_dim, case.page_tokens)
    counts = [Counts(key=k, value=v, all=n) for k, v, n in case.counts]
    stored = [max(c.key, c.value) for c in counts]
    options = {"seed": seed, "device": device, "spread": case.spread}
    pages = random_pages(layout, stored, case.heads, **options)
    dtype = torch.float32 if case.dtype == torch.float32 else case.dtype
    exact = random_exact(counts, case.heads, case.head_dim, sinks=case.sinks, dtype=dtype, seed=seed + 1, device=device)
    generator = torch.Generator().manual_seed(seed + 2)
    shape = (len(counts), case.heads * case.group, case.queries, case.head_dim)
    q = torch.randn(shape, generator=generator).to(case.dtype).to(device)
    settings = dict(case.settings)
    if settings.pop("sink_logits", False):
        settings["sink_logits"] = torch.randn(case.heads * case.group, generator=generator).to(device)
    # The newest query is the newest token of all.
    newest = torch.tensor([case.sinks + c.all - case.queries for c in counts], dtype=torch.int32)
    query = Query(q=q, scale=case.head_dim**-0.5, positions=newest.clamp_min(0).to(device), **settings)
    lengths = torch.tensor([min(c.key, c.value) for c in counts], dtype=torch.int32, device=device)
    plan = DecodePlan(
        layout,
        batch=len(counts),
        heads=case.heads,
        group=case.group,
        queries=case.queries,
        device=device,
        slots=case.slots,
        impl="triton",
    )
    plan.update(lengths, query.positions, query.window, case.sinks)
    for buffer in (plan.partial, plan.partial_lse, plan.lse):
        buffer.fill_(torch.nan)
    return query, pages, lengths, plan, exact


def check(found, want: torch.Tensor, lse: torch.Tensor, tolerance: float = 1.0) -> None:
    out = found.out.double().cpu()
    assert torch.isfinite(out).all()
    error, size = (out - want.cpu()).norm(dim=-1), want.cpu().norm(dim=-1)
    assert error.norm() <= tolerance * FROBENIUS * size.norm()
    seen = torch.isfinite(lse.cpu())
    # A row whose values cancel has a large relative error and a small one beside the batch's typical row. Queries are
    # multiplied with 11 bits, so a score, and with it the logarithm of a weight, is off by up to 2^-11 of its own size.
    row = (lse.cpu().abs().where(seen, torch.zeros(())) * 2**-11).clamp_min(WORST_ROW)
    assert (error <= tolerance * row * size.clamp_min(size[size > 0].median())).all()
    assert torch.equal(torch.isfinite(found.lse.cpu()), seen)
    wanted = lse.cpu()[seen]
    assert ((found.lse.double().cpu()[seen] - wanted).abs() <= tolerance * (5e-3 + 5e-4 * wanted.abs())).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_equals_softmax_over_dequantized_tokens(case, device):
    query, pages, lengths, plan, exact = setup(case, device)
    out = torch.full_like(query.q, torch.nan)
    found = decode_attention(query, pages, lengths, plan, exact, out=out, impl="triton")
    assert found.ran.impl == "triton"
    want, lse = dense_attention(query, pages, lengths, exact, torch.float64)
    # bf16 keeps 8 bits of the result.
    check(found, want, lse, 4.0 if case.dtype == torch.bfloat16 else 1.0)


@pytest.mark.parametrize("case", [CASES[2], CASES[15]], ids=str)
def test_the_oracle_comparison_can_fail(case, device):
    query, pages, lengths, plan, exact = setup(case, device)
    found = decode_attention(query, pages, lengths, plan, exact, impl="triton")
    want, lse = dense_attention(replace(query, scale=query.scale * 1.01), pages, lengths, exact, torch.float64)
    with pytest.raises(AssertionError):
        check(found, want, lse)


@pytest.mark.parametrize(
    ("width", "kind"),
    [(w, k) for w in ("4", "2c32") for k in ("dominant", "equal", "huge q", "constant values", "zero scales")]
    + [("2", "dominant"), ("2", "constant values"), ("book4", "huge q"), ("book4", "zero scales")],
)
def test_adversarial_numbers(width, kind, device):
    case = Case(key=width, value="4" if "c" in width else width, counts=((192, 192, 192), (64, 64, 64)), head_dim=64)
    query, pages, lengths, plan, _ = setup(case, device)
    q = query.q
    if kind == "dominant":
        dense = pages.part(0, 1).dense("key", torch.float32)[:, :, 5]
        q = (dense.repeat_interleave(case.group, 1).unsqueeze(2) * 4).to(q.dtype)
    elif kind == "equal":
        q = torch.zeros_like(q)
    elif kind == "huge q":
        q = q * 1e3
    else:
        for name in ("meta", "norm"):
            sections = {section.name for section in pages.layout.value.sections}
            if name in sections:
                numbers = pages.pool.all(pages.layout.places["value", name])
                numbers[..., 0 if name == "meta" else slice(None)] = 0
                if kind == "constant values" and name == "meta":
                    numbers[..., 1] = 0.75
        pages.pool.value_limit.zero_()
    query = replace(query, q=q, positions=None)
    found = decode_attention(query, pages, lengths, plan, impl="triton")
    want, lse = dense_attention(query, pages, lengths, None, torch.float64)
    assert torch.isfinite(found.out).all()
    assert ((found.lse.double().cpu() - lse.cpu()).abs() <= 5e-3 + 5e-4 * lse.cpu().abs()).all()
    # Scores of queries of 1e3 carry the error of 11-bit factors times their own size, and so do the weights.
    bound = 0.3 if kind == "huge q" else 4e-3
    assert (found.out.double().cpu() - want.cpu()).abs().max() <= bound * max(float(want.abs().max()), 1e-6)


def test_pages_that_lie_more_than_2_gib_apart(device):
    """Page numbers times bytes exceed 32 bits: two slabs are addressed from the first one's start."""
    case = Case(key="4", value="4", counts=((130, 130, 130),))
    query, pages, lengths, plan, exact = setup(case, device)
    want = decode_attention(query, pages, lengths, plan, exact, impl="triton").out.clone()
    far = torch.empty((1 << 31) + (1 << 20) if device.type == "cpu" else 1 << 33, dtype=torch.uint8, device=device)
    # Unlike a page's own size, and pages start where no number of whole pages does.
    stride, offset = pages.pool.page_bytes + 16, 48
    pool = Pool.borrow(far, pages.layout, pages.heads, stride=stride, offset=offset)
    table = torch.zeros_like(pages.table, dtype=torch.int64)
    for i, number in enumerate(pages.table[0].tolist()):
        table[0, i] = pool.pages - 4 + i
        pool.base[table[0, i]] = pages.pool.base[number]
    # Memory was filled by another than the pool, which is then told how large scales are.
    pool.value_limit.copy_(pages.pool.value_limit)
    moved = replace(pages, pool=pool, numbers=table)
    found = decode_attention(query, moved, lengths, plan, exact, impl="triton")
    assert torch.equal(found.out, want)
    wrong = replace(moved, numbers=torch.where(table > 0, table - (1 << 31) // stride, table))
    assert not torch.equal(decode_attention(query, wrong, lengths, plan, exact, impl="triton").out, want)


def test_the_same_plan_gives_the_same_bits(device):
    query, pages, lengths, plan, exact = setup(CASES[2], device)
    first = decode_attention(query, pages, lengths, plan, exact, impl="triton").out.clone()
    assert torch.equal(first, decode_attention(query, pages, lengths, plan, exact, impl="triton").out)


def test_a_page_may_stand_in_several_tables(device):
    case = replace(CASES[2], counts=((128, 128, 128), (128, 128, 128)))
    query, pages, lengths, plan, _ = setup(case, device)
    pages.table[1] = pages.table[0]
    query = replace(query, q=query.q[:1].expand_as(query.q), positions=None)
    found = decode_attention(query, pages, lengths, plan, impl="triton").out
    assert torch.equal(found[0], found[1])


def test_a_million_tokens(device):
    if device.type != "cuda":
        pytest.skip("a million tokens take minutes in the interpreter")
    from kvq.bench.bench import full_pages
    from kvq.bench.roofline import Shape

    shape = Shape(batch=1, context=1 << 20, kv_heads=1, group=4, head_dim=128)
    layout = layout_of("2", "4")
    pages = full_pages(shape, layout, device, 0)
    lengths = torch.tensor([shape.context], dtype=torch.int32, device=device)
    plan = DecodePlan(layout, batch=1, heads=1, group=4, device=device, impl="triton")
    plan.update(lengths)
    query = Query(q=torch.randn(1, 4, 1, 128, device=device), scale=128**-0.5)
    found = decode_attention(query, pages, lengths, plan, impl="triton")
    want, lse = dense_attention(query, pages, lengths, None, torch.float64)
    check(found, want, lse)
