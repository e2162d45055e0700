"""A chain changes what is stored and nothing that attention computes: products with keys, and sums of values."""

import dataclasses

import pytest
import torch

from kvq.errors import RecipeError
from kvq.kernels.cpp import build
from kvq.kernels.cpp.product import product, serves
from kvq.transforms import Chain, build_chain, needed_tensors, transform_spec
from kvq.transforms.hadamard import Hadamard

HEADS = 3
CHAINS = {
    "none": [],
    "hadamard": [{"kind": "hadamard"}],
    "blocks": [{"kind": "hadamard", "block": 16}],
    "signs": [{"kind": "hadamard", "seed": 3}],
    "two": [{"kind": "hadamard", "seed": 1, "block": 32}, {"kind": "hadamard"}],
    "smooth": [{"kind": "smooth"}],
    "align": [{"kind": "align"}],
    "spectral": [{"kind": "spectral"}],
    "balance": [{"kind": "balance"}],
    "all": [{"kind": "align"}, {"kind": "smooth"}, {"kind": "balance"}, {"kind": "hadamard"}],
}


def chain(name, head_dim=64):
    """A chain with random tensors."""
    specs = [transform_spec(**settings) for settings in CHAINS[name]]
    generator, artefacts = torch.Generator().manual_seed(2), {}
    for what, own in needed_tensors(specs, HEADS, head_dim).items():
        shape = own.shape
        x = torch.rand(shape, dtype=torch.float64, generator=generator) + 0.5
        half = head_dim // 2
        if what.endswith("partner"):
            x = torch.cat([torch.arange(half) + half, torch.arange(half)])
        elif what.endswith(("real", "imaginary")):
            sign = -1 if what.endswith("imaginary") else 1
            x = torch.cat([x[..., :half], sign * x[..., :half]], -1)
        elif what.endswith("matrix"):
            x = x + 3 * torch.eye(head_dim, dtype=torch.float64)
        artefacts[what] = x
    return build_chain(specs, head_dim, artefacts)


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3 + 1


@pytest.mark.parametrize("name", CHAINS)
def test_products_with_written_keys_are_those_with_the_keys(name):
    k, q = numbers(2, 3, 7, 64), numbers(2, 3, 5, 64, seed=1)
    found = chain(name).transform_query(q) @ chain(name).forward(k).transpose(-1, -2)
    assert torch.allclose(found, q @ k.transpose(-1, -2), atol=1e-10)
    assert bool(chain(name)) == (name != "none")


@pytest.mark.parametrize("name", CHAINS)
def test_the_inverse_takes_back_tokens_and_weighted_sums(name):
    v, p = numbers(2, 3, 7, 64), torch.rand(2, 3, 5, 7, dtype=torch.float64)
    assert torch.allclose(chain(name).inverse(chain(name).forward(v)), v, atol=1e-12)
    assert torch.allclose(chain(name).inverse(p @ chain(name).forward(v)), p @ v, atol=1e-12)


def test_an_outlier_is_spread_over_its_block():
    x = torch.zeros(1, 64, dtype=torch.float64)
    x[0, 17] = 8.0
    assert torch.allclose(chain("hadamard").forward(x).abs(), torch.ones(1, 64, dtype=torch.float64))
    blocks = chain("blocks").forward(x)
    assert blocks[0, 16:32].abs().min() == 2.0
    assert blocks[0, :16].abs().max() == 0.0


def test_signs_depend_on_the_seed():
    x = numbers(1, 64)
    assert not torch.allclose(chain("signs").forward(x), chain("hadamard").forward(x))
    again = Chain((Hadamard(block=64, seed=3),))
    assert torch.equal(again.forward(x), chain("signs").forward(x))


def test_sixteen_bits_are_rounded_once():
    x = numbers(5, 64).to(torch.bfloat16)
    assert torch.equal(chain("two").forward(x), chain("two").forward(x.float()).to(torch.bfloat16))


@pytest.mark.parametrize("name", CHAINS)
def test_steps_of_some_heads_are_those_of_the_layer(name):
    x = numbers(2, HEADS, 5, 64)
    some = chain(name).of_heads((2, 0))
    assert torch.allclose(some.forward(x[:, [2, 0]]), chain(name).forward(x)[:, [2, 0]], atol=1e-12)
    assert torch.allclose(some.transform_query(x[:, [2, 0]]), chain(name).transform_query(x)[:, [2, 0]], atol=1e-12)


def test_folded_steps_are_left_to_the_weights():
    whole, x = chain("all"), numbers(2, HEADS, 5, 64)
    rest = dataclasses.replace(whole, folded=2)
    for function in ("forward", "transform_query"):
        first = getattr(whole.first(2), function)(x)
        assert torch.allclose(getattr(rest, function)(first), getattr(whole, function)(x), atol=1e-12)
    assert torch.allclose(rest.inverse(whole.forward(x)), whole.first(2).forward(x), atol=1e-10)
    assert torch.allclose(rest.whole.inverse(whole.forward(x)), x, atol=1e-10)
    assert not dataclasses.replace(whole, folded=4)


def test_a_step_without_its_tensors_names_the_way_to_them():
    with pytest.raises(RecipeError, match=r"'balance' needs statistics of this model: run 'kvq calibrate"):
        build_chain([transform_spec(kind="balance")], 64)


def test_an_ordinary_dual_is_wrong_for_a_step_that_is_no_rotation():
    """Control for the products above: writing queries like keys changes products, unless the step is a rotation."""
    k, q = numbers(2, HEADS, 7, 64), numbers(2, HEADS, 5, 64, seed=1)
    for name in ("smooth", "balance"):
        found = chain(name).forward(q) @ chain(name).forward(k).transpose(-1, -2)
        assert not torch.allclose(found, q @ k.transpose(-1, -2), rtol=1e-2)


@pytest.mark.parametrize("name", CHAINS)
def test_a_placed_chain_and_a_composed_one_are_the_chain(name):
    """Where tokens are, tensors are made once and nothing is rounded twice; as one product, to rounding."""
    whole = chain(name)
    x = torch.randn(2, HEADS, 5, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cpu = torch.device("cpu")
    for dtype in (torch.float32, torch.float64):
        placed, composed = whole.to(cpu, dtype), whole.composed(HEADS, 64, cpu, dtype)
        assert placed is whole.to(cpu, dtype)
        assert composed is whole.composed(HEADS, 64, cpu, dtype)
        for way in ("forward", "transform_query", "inverse"):
            want = getattr(whole, way)(x.to(dtype))
            assert torch.equal(getattr(placed, way)(x.to(dtype)), want)
            found = getattr(composed, way)(x.to(dtype))
            assert found.dtype == dtype
            assert (found - want).abs().max() <= (1e-5 if dtype == torch.float32 else 1e-12) * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "vectors", "head_dim"), [(1, 1, 64), (2, 3, 80), (1, 16, 16), (3, 5, 128)])
def test_a_few_vectors_times_matrices_in_one_call(rows, vectors, head_dim, dtype):
    if build.unavailable() is not None:
        pytest.skip(build.unavailable())
    x = torch.randn(rows, vectors, HEADS, head_dim, generator=torch.Generator().manual_seed(2)).to(dtype)
    x = x.transpose(1, 2)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    matrix = torch.randn(HEADS, head_dim, head_dim, generator=torch.Generator().manual_seed(3)).to(wide)
    offset = torch.randn(HEADS, 1, head_dim, generator=torch.Generator().manual_seed(4)).to(wide)
    assert serves(x)
    for own in (None, offset):
        want = x.double() @ matrix.double() + (0 if own is None else own.double())
        found = product(x, matrix, own)
        assert found.dtype == dtype
        bound = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 4e-3}[dtype]
        assert (found.double() - want).norm() < bound * want.norm()
    assert not serves(x.repeat(17, 1, 1, 1))
    assert not serves(x.transpose(2, 3))
