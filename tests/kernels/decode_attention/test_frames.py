"""Keys relative to their block, read in one pass: against fp64 attention over keys that have left the frame."""

from dataclasses import dataclass, replace

import pytest
import torch
from made_pages import Counts, random_exact
from transformers import AutoConfig

from kvq.bench.samples import layout_of, random_pages
from kvq.cache.turns import Turns
from kvq.errors import KernelError
from kvq.kernels.decode_attention import decode_attention
from kvq.kernels.decode_attention.decode_plan import DecodePlan
from kvq.kernels.decode_attention.reference import dense_attention
from kvq.kernels.types import Query
from kvq.models.rope import rope_of
from kvq.transforms.chain import Chain
from kvq.transforms.frame import Frame
from kvq.transforms.steps import Matrix, Shift

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, "rope_theta": 10000.0}
LAYOUTS = {
    "half-split": ("llama", {}),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "interleaved": ("cohere", {}),
    "partial": ("glm", {"partial_rotary_factor": 0.5}),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call. ``counts``: as in test_decode_attention; ``steps``: of the frame's chain; ``scale``: keeps scores of
    random codes to tens, so that weights are not those of one token."""

    key: str
    value: str = "even2"
    counts: tuple = ((128, 70, 134), (0, 0, 9), (384, 384, 390))
    block: int = 64
    head_dim: int = 64
    page_tokens: int = 128
    group: int = 2
    queries: int = 1
    sinks: int = 2
    rope: str = "half-split"
    steps: tuple = ("shift", "matrix")
    softcap: float | None = None
    scale: float = 0.1
    dtype: torch.dtype = torch.float32
    heads: int = 2

    def __str__(self) -> str:
        shown = f"k{self.key}-v{self.value}-u{self.block}-d{self.head_dim}-g{self.group}-l{self.queries}-{self.rope}"
        return f"{shown}-{'+'.join(self.steps)}-{str(self.dtype).removeprefix('torch.')}"


CASES = [
    # The tiers of klt, in blocks of half a page, a page, a quarter.
    Case(key="4.2.2.2c128r", counts=((128, 70, 134), (256, 256, 260))),
    Case(key="4.2.2.2c128r", value="2z", block=128, group=4, rope="interleaved", heads=1),
    Case(key="4.2.0.0c128r", block=32, rope="partial", head_dim=128, dtype=torch.bfloat16, heads=1),
    Case(
        key="8.4.3.3c128r", value="4", head_dim=128, group=8, rope="yarn", scale=0.05, heads=1, counts=((128, 70, 134),)
    ),
    Case(key="4.2.2.2c128r", head_dim=256, counts=((256, 200, 260),), group=1, dtype=torch.float16, heads=1),
    # Codes by channel and by token, with norms, of every kind; blocks of several pages.
    Case(key="2c32", value="2/32", block=16, page_tokens=64, counts=((64, 50, 70), (192, 192, 200)), heads=1),
    Case(key="2c32n", value="4", page_tokens=64, counts=((64, 64, 70),), steps=("shift",)),
    Case(key="4", value="4", page_tokens=64, counts=((70, 70, 75), (0, 0, 0), (193, 193, 193)), group=3),
    Case(key="4/32", value="4", block=128, page_tokens=64, counts=((70, 75, 75), (193, 190, 195)), steps=("matrix",)),
    Case(key="book3", value="book3", page_tokens=64, counts=((70, 70, 75), (190, 190, 195)), rope="interleaved"),
    Case(key="4", value="4", head_dim=80, page_tokens=64, counts=((70, 70, 75), (140, 140, 141))),
    Case(key="4s", value="4", page_tokens=64, counts=((70, 70, 75),), steps=()),
    Case(
        key="4", value="4", page_tokens=64, block=16, counts=((70, 64, 79), (20, 20, 27)), queries=8, group=3, heads=1
    ),
    Case(key="4.2.2.2c128r", softcap=5.0, queries=2, heads=1, counts=((128, 128, 140), (256, 130, 270))),
    # Many rounds: queries are turned several times.
    Case(key="2", value="2", page_tokens=16, block=16, counts=((600, 600, 601),), sinks=0, heads=1),
]


def drawn(*shape, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def frame_of(case: Case) -> Frame:
    kind, settings = LAYOUTS[case.rope]
    sizes = {"hidden_size": 4 * case.head_dim, "num_attention_heads": 4, "num_key_value_heads": 2}
    rope = rope_of(AutoConfig.for_model(kind, head_dim=case.head_dim, **sizes, **settings))
    made = {
        "shift": Shift(0.5 * drawn(case.heads, case.head_dim, seed=3)),
        "matrix": Matrix(drawn(case.heads, case.head_dim, case.head_dim, seed=4) / case.head_dim**0.5),
    }
    chain = Chain(tuple(made[name] for name in case.steps))
    return Frame(rope=rope, block=case.block, heads=case.heads, head_dim=case.head_dim, chain=chain)


def setup(case: Case, device: torch.device):
    """(query, pages, lengths, plan, exact, frame, origins) of a case; rows stand at positions of their own, some with
    a gap."""
    layout = layout_of(case.key, case.value, case.head_dim, case.page_tokens)
    counts = [Counts(key=k, value=v, all=n) for k, v, n in case.counts]
    pages = random_pages(layout, [max(c.key, c.value) for c in counts], case.heads, device=device)
    options = {"sinks": case.sinks, "dtype": case.dtype, "device": device}
    exact = random_exact(counts, case.heads, case.head_dim, seed=1, **options)
    q = drawn(len(counts), case.heads * case.group, case.queries, case.head_dim, seed=2).to(case.dtype).to(device)
    newest = torch.tensor([case.sinks + c.all - case.queries for c in counts], dtype=torch.int32)
    positions = newest.clamp_min(0).to(device)
    query = Query(q=q, scale=case.scale * case.head_dim**-0.5, positions=positions, softcap=case.softcap)
    lengths = torch.tensor([min(c.key, c.value) for c in counts], dtype=torch.int32, device=device)
    heads = {"batch": len(counts), "heads": case.heads, "group": case.group, "queries": case.queries}
    plan = DecodePlan(layout, **heads, device=device, slots=4, frame=case.block, impl="triton")
    plan.update(lengths, positions)
    for buffer in (plan.partial, plan.partial_lse, plan.lse, plan.turned, plan.turned_bias):
        buffer.fill_(torch.nan)
    blocks = -(-max(c.key for c in counts) // case.block)
    starts = torch.tensor([2, 1000, 60000])[: len(counts), None]
    origins = starts + torch.arange(blocks) * case.block
    origins[:, blocks // 2 :] += 5
    return query, pages, lengths, plan, exact, frame_of(case), origins


def expected(case: Case, query, pages, lengths, exact, frame: Frame, origins):
    """fp64 attention over dense pages whose keys left the frame by ``Frame.leave``."""
    size = case.page_tokens
    count = pages.table.shape[1]
    stored = {side: pages.dense(side, torch.float64).cpu() for side in ("key", "value")}
    by_token = origins.repeat_interleave(case.block, dim=1)
    known = min(by_token.shape[1], count * size)
    stored["key"][:, :, :known] = frame.leave(stored["key"][:, :, :known].nan_to_num(), by_token[:, :known])
    left = _DensePages(stored, size, pages.layout, pages.heads)
    return dense_attention(query, left, lengths, exact, torch.float64)


class _DensePages:
    """Numbers as the reference asks pages for them."""

    def __init__(self, stored, size: int, layout, heads: int, rows=slice(None), first=0, last=None):
        self.stored, self.size, self.layout, self.heads = stored, size, layout, heads
        self.rows, self.first, self.last = rows, first, last

    def part(self, first: int, last: int, rows):
        return _DensePages(self.stored, self.size, self.layout, self.heads, rows, first, last)

    def dense(self, side: str, dtype) -> torch.Tensor:
        return self.stored[side][self.rows, :, self.first * self.size : self.last * self.size].to(dtype)


def check(found, want: torch.Tensor, lse: torch.Tensor, tolerance: float) -> None:
    """Queries are rounded to 11 bits twice more than where keys stand in no frame, and the matrix once."""
    out = found.out.double().cpu()
    assert torch.isfinite(out).all()
    assert (out - want).norm() <= tolerance * 2e-3 * want.norm()
    seen = torch.isfinite(lse)
    assert torch.equal(torch.isfinite(found.lse.cpu()), seen)
    assert ((found.lse.double().cpu()[seen] - lse[seen]).abs() <= tolerance * (1e-2 + 1e-3 * lse[seen].abs())).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_equals_that_over_keys_that_left_the_frame(case, device):
    query, pages, lengths, plan, exact, frame, origins = setup(case, device)
    keys = Turns().on_device(frame, lambda: origins, None, device)
    found = decode_attention(query, pages, lengths, plan, exact, frame=keys, impl="triton")
    assert found.ran.impl == "triton"
    want, lse = expected(case, query, pages, lengths, exact, frame, origins)
    tolerance = 4.0 if case.dtype == torch.bfloat16 else 1.0
    check(found, want, lse, tolerance)
    # The torch reference leaves the frame by the same numbers.
    check(decode_attention(query, pages, lengths, plan, exact, frame=keys, impl="reference"), want, lse, tolerance)


@pytest.mark.parametrize("case", [CASES[1], CASES[7]], ids=str)
def test_origins_of_one_token_later_are_noticed(case, device):
    query, pages, lengths, plan, exact, frame, origins = setup(case, device)
    want, lse = expected(case, query, pages, lengths, exact, frame, origins)
    wrong = Turns().on_device(frame, lambda: origins + 1, None, device)
    with pytest.raises(AssertionError):
        check(decode_attention(query, pages, lengths, plan, exact, frame=wrong, impl="triton"), want, lse, 4.0)


def test_a_plan_and_a_frame_of_other_blocks_are_refused(device):
    query, pages, lengths, plan, exact, frame, origins = setup(CASES[0], device)
    keys = Turns().on_device(frame, lambda: origins, None, device)
    with pytest.raises(KernelError, match="blocks of 64 tokens"):
        decode_attention(query, pages, lengths, plan, exact, impl="triton")
    with pytest.raises(KernelError, match="blocks of 64 tokens"):
        decode_attention(query, pages, lengths, plan, exact, frame=replace(keys, block=32), impl="triton")
    with pytest.raises(KernelError, match="not a power of two"):
        DecodePlan(plan.layout, batch=1, heads=2, group=2, device=device, frame=8, impl="triton")


def test_rows_share_the_turns_of_an_origin_and_only_new_ones_are_made(device):
    """What a step costs on the host does not grow with what is stored."""
    frame, turns = frame_of(CASES[0]), Turns()
    origins = torch.tensor([[0, 64, 128], [64, 128, 192]])
    first = turns.on_device(frame, lambda: origins, None, device)
    assert first.turns.shape[0] == 4
    assert first.index[0, 1] == first.index[1, 0]
    again = turns.on_device(frame, lambda: origins.clone(), None, device)
    assert again.index is first.index
    assert again.turns is first.turns
    grown = turns.on_device(frame, lambda: torch.cat([origins, origins[:, -1:] + 64], dim=1), None, device)
    assert grown.turns.shape[0] == 5
    assert torch.equal(grown.turns[:4], first.turns)
    cos, sin = frame.turns(torch.tensor([192]))
    assert torch.equal(grown.turns[grown.index[0, 3].long()], torch.cat([cos, sin]))


def test_layers_that_store_alike_ask_for_origins_once(device):
    """Until what they follow from changes, or another frame asks."""
    frame, turns, asked = frame_of(CASES[0]), Turns(), []

    def origins() -> torch.Tensor:
        asked.append(1)
        return torch.tensor([[0, 64]])

    first = turns.on_device(frame, origins, (4, 128), device)
    assert turns.on_device(frame, origins, (4, 128), device).index is first.index
    assert len(asked) == 1
    turns.on_device(frame, origins, (4, 129), device)
    turns.of(frame, origins, (4, 129), 3, torch.float32)
    assert len(asked) == 3
