"""Every shipped recipe on the CPU: what the C++ kernels serve, the bytes of torch's codecs, attention in float64."""

import itertools
from functools import lru_cache

import pytest
import torch
from shipped import LATENT_RECIPES

from kvq.cache.attend import Options, attend
from kvq.cache.fused import Steps
from kvq.cache.plan import HeadGroup, make_plan
from kvq.cache.reading import decoded, stored_tokens
from kvq.cache.serving import LATENT, serving_of
from kvq.cache.store import HeadStore
from kvq.calib.artefacts import stand_in_artefacts
from kvq.kernels.cpp import build, launch
from kvq.kernels.cpp.sides import CppSide, sides_of
from kvq.models.describe import describe
from kvq.pages.layout import SIDES
from kvq.pages.pages import Pages
from kvq.pages.pool import Pool
from kvq.recipe import Recipe, list_recipes, load_recipe

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=f"{build.unavailable()}")

CPU = torch.device("cpu")
HEADS, GROUP, HEAD_DIM = 3, 2, 64
NAMES = [name for name in list_recipes() if not load_recipe(name).is_exact]
# Shipped recipes that torch attends to on the CPU, and why.
IN_TORCH = {
    "biassafe4": "keys are stored without the bias of their projection",
    "qjl": "codec 'sketch'",
    "skvq2": "codec 'permuted'",
    "decoquant4": "codec 'decomposed'",
} | dict.fromkeys(LATENT_RECIPES, LATENT)
# Keys in a frame: blocks of a page and of parts of one, with and without steps there, and of fewer tokens than queries.
FRAMED = {
    "klt2 by page": ("klt2", "page", None),
    "klt3 by 128": ("klt3", "page", 128),
    "klt2 before RoPE": ("klt2", "pre_rope", None),
    "kivi2 by 32": ("kivi2", "page", 32),
    "turboquant3 by 16": ("turboquant3", "page", 16),
}
# Sides that torch alone packs, though the kernel reads the recipe.
PACKED_IN_TORCH = {
    (name, side) for name in ("gear2", "gear2-light", "gear4", "kvquant2", "kvquant3", "kvquant4") for side in SIDES
}


@pytest.fixture(scope="module")
def group_of(tiny_config):
    @lru_cache
    def made(name: str) -> HeadGroup:
        spec = describe(tiny_config(layers=1, heads=HEADS * GROUP, kv_heads=HEADS, head_dim=HEAD_DIM))
        recipe = framed(*FRAMED[name]) if name in FRAMED else load_recipe(name)
        artefacts = stand_in_artefacts(recipe, spec)
        generator = torch.Generator().manual_seed(9)
        for what, own in artefacts.items():
            # Matrices that can be inverted, and means that are not all alike.
            if own.ndim > 1 and own.shape[-2] == own.shape[-1]:
                artefacts[what] = torch.linalg.qr(torch.randn(own.shape, generator=generator, dtype=own.dtype)).Q
            elif what.endswith("mean"):
                artefacts[what] = torch.randn(own.shape, generator=generator, dtype=own.dtype)
        return make_plan(recipe, spec, artefacts).layers[0][0]

    return made


def framed(name: str, place: str, block: int | None) -> Recipe:
    """A recipe whose keys, and whose key transforms, stand in a frame."""
    recipe = load_recipe(name)
    settings = {"key.placement": place} | ({"key.frame": block} if block else {})
    steps = [step.to_dict() | {"at": place} for step in recipe.transforms.key]
    if steps:
        settings = {"transforms.key": steps} | ({"key.frame": block} if block else {})
    return recipe.override(settings)


def numbers(tokens: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Ordinary tokens with large channels, constants, zeros, ties, and small and large numbers, [1, K, T, D]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, HEADS, tokens, HEAD_DIM, generator=generator, dtype=torch.float64) * 2
    x[..., 5] = x[..., 5] * 0.01 + 17
    x[:, :, 3] = 1.375
    x[:, :, 4] = 0
    x[:, :, 5] *= 1e-5
    x[:, :, 6] = torch.arange(HEAD_DIM) / 2
    x[:, :, 7] *= 900
    x[:, :, 8, ::2] = 300
    x[:, :, 9] *= 1e-9
    x[:, 1, 64:128, 9] = torch.arange(64) / 2
    # No zero has a sign: torch does not say which of two is the minimum.
    return x.to(dtype) + 0


@pytest.mark.parametrize("name", NAMES)
def test_what_runs_in_torch_is_listed_with_its_reason(name, group_of):
    """A recipe that falls to torch, or needs no longer to, changes a list that says so."""
    serving = serving_of(group_of(name), CPU, torch.float32, "auto")
    assert (serving.no_cpp is None) == (name not in IN_TORCH), serving.no_cpp
    if serving.no_cpp is not None:
        assert IN_TORCH[name] in serving.no_cpp
        return
    in_torch = {(name, side) for side in SIDES if serving.cpp_packs[side] is None}
    assert in_torch == {pair for pair in PACKED_IN_TORCH if pair[0] == name}


def test_the_recipes_that_lead_are_served(group_of):
    assert not set(IN_TORCH) & {"klt4", "klt3", "klt2", "kivi2", "int4", "turboquant3"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_bytes_are_those_of_the_codecs(name, dtype, group_of):
    group, tokens = group_of(name), 256
    every, sides = numbers(tokens, dtype), sides_of(group.codecs, group.layout)
    for side in SIDES:
        own = sides[side]
        if not isinstance(own, CppSide) or not own.packs:
            continue
        slabs, unit = [], group.codecs[side].block_tokens
        x = every[..., : group.codecs[side].head_dim]
        # Whole blocks over the end of a page, single tokens, a page from its middle.
        cuts = [0, 128, 256] if unit > 1 else [0, 37, 38, 101, 256]
        for compiled in (True, False):
            pool = Pool(group.layout, HEADS)
            pages = Pages(pool=pool, ids=[list(reversed(pool.allocate(tokens // group.layout.page_tokens)))])
            for start, stop in itertools.pairwise(cuts):
                part = x[:, :, start:stop]
                if compiled:
                    assert launch.pack(part, pages, own, start)
                else:
                    pages.write(side, start, group.codecs[side].encode(part))
            slabs.append(pool.slabs[0])
        assert slabs[0].any()
        assert torch.equal(*slabs), (side, int((slabs[0] != slabs[1]).sum()))


def filled(group: HeadGroup, dtype: torch.dtype, impl: str, lengths: list[int], room: int) -> tuple:
    """A store of rows of these lengths, left-padded, and one token more of each; the snapshot of that."""
    store = HeadStore(group, len(lengths), CPU, dtype)
    store.impl = impl
    generator = torch.Generator().manual_seed(5)
    shape = (len(lengths), HEADS, room, HEAD_DIM)
    new = {side: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) * 1.5 for side in SIDES}
    new["key"][..., 3] += 4
    valid = torch.stack([torch.arange(room) >= room - length for length in lengths])
    store.append(new, valid)
    one = {side: torch.randn(len(lengths), HEADS, 1, HEAD_DIM, generator=generator).to(dtype) for side in SIDES}
    return store, store.append(one, None)


def exact_attention(store, snapshot, q: torch.Tensor, row: int) -> torch.Tensor:
    """In float64 over the numbers that the row's pages, sinks and window stand for."""
    seen = []
    for side in SIDES:
        numbers, sinks = stored_tokens(store, side, [row], snapshot).double(), store.group.sinks
        if done := store.group.rules[side].seen(snapshot.before[row]):
            # Decoded without the rounding to the tokens' own dtype.
            numbers[:, :, sinks : sinks + done] = decoded(store, side, [row], 0, done, torch.float64)
        seen.append(numbers.unsqueeze(2))
    scores = q[row : row + 1].double() @ seen[0].transpose(-1, -2) * 0.125
    return scores.softmax(-1) @ seen[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*(name for name in NAMES if name not in IN_TORCH), *FRAMED])
def test_rows_of_any_length_attend_to_what_is_stored(name, dtype, group_of):
    """As ``generate`` runs: packed by the kernel, rows of different length, sinks and window exact."""
    store, snapshot = filled(group_of(name), dtype, "cpp", [431, 300, 7], 431)
    q = torch.randn(3, HEADS, GROUP, 1, HEAD_DIM, generator=torch.Generator().manual_seed(7)).to(dtype)
    found = attend(store, snapshot, q, None, None, Options(scaling=0.125), Steps())
    assert {ran.impl for ran in store.ran} == {"cpp"}
    for row in range(3):
        want = exact_attention(store, snapshot, q, row)
        error = float((found[row : row + 1].double() - want).norm() / want.norm())
        assert error < (1e-5 if dtype == torch.float32 else 3e-3), (row, error)


@pytest.mark.parametrize("lengths", [[431, 300, 150], [190, 191, 189], [255, 66, 3]], ids=str)
@pytest.mark.parametrize("queries", [1, 3, 16])
@pytest.mark.parametrize("name", FRAMED)
def test_keys_in_a_frame_are_read_by_turned_queries_or_turned_themselves(name, queries, lengths, group_of):
    """Which of the two depends on how many queries there are; what is found must not. Exact tokens begin at the first,
    the last and middle places of a page."""
    group = group_of(name)
    assert group.frame is not None
    store, snapshot = filled(group, torch.float64, "cpp", lengths, max(lengths))
    q = torch.randn(3, HEADS, queries, 1, HEAD_DIM, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    found = attend(store, snapshot, q, None, None, Options(scaling=0.125), Steps())
    assert {ran.impl for ran in store.ran} == {"cpp"}
    for row in range(3):
        want = exact_attention(store, snapshot, q, row)
        assert (found[row : row + 1] - want).norm() < 1e-10 * want.norm(), row
    if not any(store.packed["key"]):
        return
    # Negative control: the frame matters.
    plain = exact_attention(store, snapshot, q, 0)
    store.positions.runs = [[(0, 40)] for _ in store.positions.runs]
    moved = attend(store, snapshot, q, None, None, Options(scaling=0.125), Steps())
    assert (moved[:1] - plain).norm() > 1e-3 * plain.norm()


def test_blocks_that_come_are_turned_and_others_are_kept(group_of):
    """Cosines and sines of a cache's blocks, from step to step and for rows that change."""
    frame, turns = group_of("klt2 by page").frame, Steps().turns
    origins = torch.tensor([[0, 64, 128], [7, 71, 135]])
    first = turns.of(frame, lambda: origins[:, :2], None, 3, torch.float64)
    second = turns.of(frame, lambda: origins, None, 3, torch.float64)
    assert torch.equal(second.cos[:, :2], first.cos)
    for part, want in zip((second.cos, second.sin), frame.turns(origins, torch.float64)):
        assert torch.equal(part, want)
    assert turns.of(frame, lambda: origins, None, 3, torch.float64).cos is second.cos
    other = turns.of(frame, lambda: origins.flip(0), None, 3, torch.float64)
    assert torch.equal(other.cos, second.cos.flip(0))
    assert not torch.equal(other.sin, second.sin)


def test_a_page_that_changes_changes_what_is_found(group_of):
    """Negative control of the test above: one byte of every section of one page."""
    store, snapshot = filled(group_of("klt2"), torch.float32, "cpp", [431, 300], 431)
    q = torch.randn(2, HEADS, GROUP, 1, HEAD_DIM, generator=torch.Generator().manual_seed(7))
    options = Options(scaling=0.125)
    before = attend(store, snapshot, q, None, None, options, Steps())
    for place in (place for place in store.group.layout.places.values() if place.nbytes):
        part = store.pool.part(store.tables.rows[0][1], place).view(torch.uint8).flatten(1)
        held = part.clone()
        part[1] ^= 0x15
        after = attend(store, snapshot, q, None, None, options, Steps())
        assert not torch.equal(before[0, 1], after[0, 1])
        assert torch.equal(before[1], after[1])
        part.copy_(held)
    assert torch.equal(attend(store, snapshot, q, None, None, options, Steps()), before)
