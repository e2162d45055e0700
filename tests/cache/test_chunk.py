"""Many queries at once where Triton runs: what the chunk needs does not grow with the past."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvq.cache import chunk
from kvq.cache.attend import Options
from kvq.cache.context import ForwardContext
from kvq.cache.layer import HANDLE, PackedLayer
from kvq.cache.plan import make_plan
from kvq.kernels.dispatch import triton_version
from kvq.models.describe import describe
from kvq.recipe import load_recipe

HEADS, GROUP, HEAD_DIM, QUERIES = 1, 4, 32, 48

pytestmark = pytest.mark.skipif(triton_version() is None, reason="triton is not installed")


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operator made; views of what it was given do not count."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        found = func(*args, **(kwargs or {}))
        for out in found if isinstance(found, tuple | list) else (found,):
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in given:
                self.nbytes = max(self.nbytes, out.nbytes)
        return found


def largest(tiny_config, impl: str, past: int) -> tuple[int, torch.Tensor]:
    """Bytes of the largest tensor that attention of a chunk makes after ``past`` tokens, and its output."""
    recipe = load_recipe("int4").override({"tokens.window": 16})
    config = tiny_config(layers=1, heads=HEADS * GROUP, kv_heads=HEADS, head_dim=HEAD_DIM)
    context = ForwardContext(impl)
    layer = PackedLayer(make_plan(recipe, describe(config)).layers[0], context)
    layer.reads_handle = True
    generator = torch.Generator().manual_seed(5)
    for new in (past, QUERIES):
        keys, values = (torch.randn(1, HEADS, new, HEAD_DIM, generator=generator) for _ in range(2))
        query = torch.randn(1, HEADS * GROUP, new, HEAD_DIM, generator=generator)
        context.begin(None)
        found, _ = layer.update(keys, values)
    with Largest() as seen:
        out = getattr(found, HANDLE).attend(query, None, Options(scaling=HEAD_DIM**-0.5))
    assert {ran.impl for ran in layer.stores[0].ran} == {impl}
    return seen.nbytes, out


def test_a_chunk_takes_memory_that_does_not_grow_with_the_past(tiny_config, monkeypatch):
    monkeypatch.setattr(chunk, "SCRATCH_TOKENS", 64)
    sizes, bound = {}, chunk.scratch_bytes(1, HEADS, HEAD_DIM, GROUP, QUERIES, itemsize=4)
    for past in (150, 400):
        (size, found), (sizes[past], want) = (largest(tiny_config, impl, past) for impl in ("triton", "reference"))
        assert (found - want).abs().max() < 2e-3 * want.abs().max()
        assert size <= bound
        # A score matrix over the past would be larger from some past on.
        assert bound < 4 * GROUP * QUERIES * 400
    # The reference holds scores of the past, as the measure can see.
    assert sizes[400] > 1.5 * sizes[150] > bound / 2
