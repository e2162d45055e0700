"""A cache whose pages lie in memory that an engine lends: nothing in cache or kernels asks who allocated them."""

import pytest
import torch

from kvq.cache.attend import Options, attend
from kvq.cache.fused import Steps
from kvq.cache.page_tables import PageTables
from kvq.cache.plan import make_plan
from kvq.cache.reading import stored_tokens
from kvq.cache.store import HeadStore
from kvq.calib.artefacts import stand_in_artefacts
from kvq.errors import CacheError
from kvq.models.describe import describe
from kvq.pages.layout import SIDES
from kvq.pages.pool import Pool
from kvq.recipe import load_recipe

ROWS, HEADS, HEAD_DIM, PAGES = 2, 2, 32, 24
# As fp16 and as e4m3 NaN.
POISON = 0x7F
# Plain codes, blocks, keys before RoPE with a shared record, sections of many kinds.
RECIPES = {
    "int4": {"tokens.sinks": 3, "tokens.window": 9},
    "kivi2": {"tokens.window": 32},
    "kvquant3": {},
    "gear2": {"value.group": 32},
}


@pytest.fixture(params=RECIPES)
def group(request, tiny_config):
    recipe, spec = load_recipe(request.param).override(RECIPES[request.param]), describe(tiny_config(head_dim=HEAD_DIM))
    return make_plan(recipe, spec, stand_in_artefacts(recipe, spec)).layers[0][0]


def stores(group):
    """Two users of one lent buffer with tables of the lender's, and the buffer with a mask of their pages."""
    size = group.layout.page_bytes(HEADS)
    memory = torch.full((PAGES * (size + 16) + 48,), POISON, dtype=torch.uint8)
    pool = Pool.borrow(memory, group.layout, HEADS, stride=size + 16, offset=48)
    order = torch.randperm(PAGES, generator=torch.Generator().manual_seed(1)).tolist()
    used = torch.zeros(len(memory), dtype=torch.bool)
    made = []
    for user in range(2):
        store = HeadStore(group, ROWS, torch.device("cpu"))
        store.tables = PageTables(pool, ROWS)
        store.tables.rows = [order[5 * (2 * user + row) : 5 * (2 * user + row + 1)] for row in range(ROWS)]
        for page in (page for table in store.tables.rows for page in table):
            used[48 + page * (size + 16) :][:size] = True
        made.append(store)
    return made, memory, used


def steps(store, seed: int, impl: str) -> list[torch.Tensor]:
    """What attention gives while a prompt and single tokens arrive, with a padded row; then all tokens as stored."""
    generator, options, shared = torch.Generator().manual_seed(seed), Options(scaling=0.2), Steps()
    store.impl = impl
    found, valid = [], torch.ones(ROWS, 150, dtype=torch.bool)
    valid[1, :30] = False
    for count in (150, *[1] * (2 if impl == "triton" else 70)):
        x = {side: torch.randn(ROWS, HEADS, count, HEAD_DIM, generator=generator) * 2 + 0.5 for side in SIDES}
        q = torch.randn(ROWS, HEADS, 2, count, HEAD_DIM, generator=generator)
        snapshot = store.append(x, valid if count > 1 else None)
        # A prompt attends to itself.
        if count == 1:
            found.append(attend(store, snapshot, q, None, None, options, shared))
    found += [stored_tokens(store, side, [row]) for side in SIDES for row in range(ROWS)]
    return found


@pytest.mark.parametrize("impl", ["reference", "auto", "triton"])
def test_a_cache_in_lent_pages_is_one_in_its_own(group, impl):
    if impl == "triton":
        pytest.importorskip("triton")
        if group.rules["key"].unit == 1 or group.frame is not None or group.layout.shared_bytes:
            pytest.skip("one recipe shows it: the interpreter takes its time")
    users, memory, used = stores(group)
    for seed, store in enumerate(users):
        found = steps(store, seed, impl)
        own = HeadStore(group, ROWS, torch.device("cpu"))
        want = steps(own, seed, impl)
        assert store.ran == own.ran
        for a, b in zip(found, want, strict=True):
            assert torch.equal(a, b)
    assert (memory[~used] == POISON).all()
    assert not (memory[used] == POISON).all()


def test_other_tables_give_other_numbers_and_a_full_table_is_an_error(group):
    """Negative control: pages in another order; and only the lender can add a page."""
    users, _, _ = stores(group)
    good = steps(users[0], 0, "reference")
    table = users[0].tables.rows[0]
    table[0], table[1] = table[1], table[0]
    assert not torch.equal(stored_tokens(users[0], "key", [0]), good[-4])
    users[1].tables.rows = [table[:1] for table in users[1].tables.rows]
    with pytest.raises(CacheError, match="cannot allocate pages in borrowed memory"):
        steps(users[1], 1, "reference")
