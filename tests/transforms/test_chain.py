"""A chain changes what is stored and nothing that attention computes: products with keys, and sums of values."""

import pytest
import torch

from kvq.errors import RecipeError
from kvq.specs import TransformSpec
from kvq.transforms import Chain, Hadamard, build_chain, hadamard_matrix

CHAINS = {
    "none": [],
    "hadamard": [{}],
    "blocks": [{"block": 16}],
    "signs": [{"seed": 3}],
    "two": [{"seed": 1, "block": 32}, {}],
}


def chain(name):
    return build_chain([TransformSpec(kind="hadamard", **settings) for settings in CHAINS[name]], head_dim=64)


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3 + 1


@pytest.mark.parametrize("order", [1, 2, 16, 64, 256])
def test_hadamard_matrices_are_orthonormal_with_entries_of_one_size(order):
    matrix = hadamard_matrix(order)
    assert torch.allclose(matrix @ matrix.T, torch.eye(order, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, order**-0.5), atol=1e-12)


@pytest.mark.parametrize("name", CHAINS)
def test_products_with_written_keys_are_those_with_the_keys(name):
    k, q = numbers(2, 3, 7, 64), numbers(2, 3, 5, 64, seed=1)
    found = chain(name).dual(q) @ chain(name).write(k).transpose(-1, -2)
    assert torch.allclose(found, q @ k.transpose(-1, -2), atol=1e-10)
    assert bool(chain(name)) == (name != "none")


@pytest.mark.parametrize("name", CHAINS)
def test_undo_takes_back_tokens_and_weighted_sums(name):
    v, p = numbers(2, 3, 7, 64), torch.rand(2, 3, 5, 7, dtype=torch.float64)
    assert torch.allclose(chain(name).undo(chain(name).write(v)), v, atol=1e-12)
    assert torch.allclose(chain(name).undo(p @ chain(name).write(v)), p @ v, atol=1e-12)


def test_an_outlier_is_spread_over_its_block():
    x = torch.zeros(1, 64, dtype=torch.float64)
    x[0, 17] = 8.0
    assert torch.allclose(chain("hadamard").write(x).abs(), torch.ones(1, 64, dtype=torch.float64))
    blocks = chain("blocks").write(x)
    assert blocks[0, 16:32].abs().min() == 2.0
    assert blocks[0, :16].abs().max() == 0.0


def test_signs_depend_on_the_seed():
    x = numbers(1, 64)
    assert not torch.allclose(chain("signs").write(x), chain("hadamard").write(x))
    again = Chain((Hadamard(block=64, seed=3),))
    assert torch.equal(again.write(x), chain("signs").write(x))


def test_sixteen_bits_are_rounded_once():
    x = numbers(5, 64).to(torch.bfloat16)
    assert torch.equal(chain("two").write(x), chain("two").write(x.float()).to(torch.bfloat16))


@pytest.mark.parametrize(("block", "head_dim"), [(48, 96), (32, 80), (128, 64)])
def test_a_block_that_does_not_fit_is_refused(block, head_dim):
    with pytest.raises(RecipeError, match=f"block={block} does not fit head_dim={head_dim}"):
        build_chain([TransformSpec(kind="hadamard", block=block)], head_dim)
