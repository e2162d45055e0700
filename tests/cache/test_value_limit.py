"""The bound of the values' scales that kernels read is that of the pages, whoever packed them."""

import pytest
import torch

from kvq.cache.layer import packed_layers
from kvq.integrations.runtime import new_cache, quantized_cache
from kvq.kernels.dispatch import interpreted, why_no_triton
from kvq.recipe import load_recipe

DEVICE = "cpu" if interpreted() or not torch.cuda.is_available() else "cuda"


@pytest.mark.parametrize("name", ["int4", "kivi2", "nf4", "nvfp4", "turboquant4"])
@pytest.mark.parametrize("impl", ["triton", "auto"])
def test_the_bound_is_the_largest_scale_in_the_pages(tiny_model, name, impl):
    """After a prompt, a chunk and a step: raised by the pack kernel, by torch, and found where C++ wrote by address."""
    if impl == "triton" and why_no_triton(torch.device(DEVICE)):
        pytest.skip(why_no_triton(torch.device(DEVICE)))
    model = tiny_model(layers=1, heads=2, kv_heads=2, head_dim=32).to(DEVICE)
    ids = torch.randint(3, 100, (1, 81), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    with quantized_cache(model, load_recipe(name).override({"tokens.window": 32}), impl=impl), torch.no_grad():
        cache = new_cache(model)
        model(ids[:, :40], past_key_values=cache)
        (layer,) = packed_layers(cache)
        pools = [store.pool for store in layer.stores]
        before = [pool.value_limit.clone() for pool in pools]
        # Larger values than any before, so that the bound must move.
        model.get_submodule("model.layers.0.self_attn.v_proj").weight.mul_(8)
        for chunk in (ids[:, 40:80], ids[:, 80:]):
            model(chunk, past_key_values=cache)
    for store, pool, old in zip(layer.stores, pools, before):
        largest = []
        for head in range(pool.heads):
            scales = []
            for section in pool.layout.value.sections:
                numbers = torch.cat(
                    [pool.read(pool.runs(ids), pool.layout.places["value", section.name]) for ids in store.tables.rows]
                )
                number = numbers[:, head].unsqueeze(-1) if section.name == "norm" else numbers[:, head, ..., 0]
                scales.append(_as_numbers(number, pool.layout.value.meta_format))
            largest.append(float(torch.stack(torch.broadcast_tensors(*scales)).prod(0).max()))
        assert pool.value_limit.tolist() == pytest.approx(largest)
        assert (pool.value_limit > old).all()


def _as_numbers(stored: torch.Tensor, form: str) -> torch.Tensor:
    if stored.dtype == torch.float16:
        return stored.float()
    return stored.view(torch.float8_e4m3fn).float() if form == "e4m3" else torch.exp2(stored.float() - 127)
