"""Hadamard matrices of every order in use, from their constructions."""

import pytest
import torch

from kvq.errors import RecipeError
from kvq.transforms import build_chain, transform_spec
from kvq.transforms.hadamard import DENSE_ORDER, rotate
from kvq.transforms.hadamard_matrix import hadamard_matrix, known_order

HEAD_DIMS = (16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 512, 576)
HIDDEN_SIZES = (896, 1536, 2304, 2560, 2880, 3072, 3584, 4608, 5120, 5376, 6144, 6656, 7168)
# Multiples of 4 that need other constructions (Williamson's, ...).
UNREACHED = {92, 116, 156, 172, 184, 188, 232, 236, 260}


@pytest.mark.parametrize("order", [1, 2, *HEAD_DIMS, 12, 20, 28, 36, 52, 100, 124, 244])
def test_matrices_are_orthonormal_with_entries_of_one_size(order):
    matrix = hadamard_matrix(order)
    assert torch.allclose(matrix @ matrix.T, torch.eye(order, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, order**-0.5), atol=1e-12)


def test_every_order_that_the_constructions_reach_is_known():
    known = {order for order in range(4, 264, 4) if known_order(order)}
    assert known == set(range(4, 264, 4)) - UNREACHED
    assert all(known_order(order) for order in (*HEAD_DIMS, *HIDDEN_SIZES))
    assert not any(known_order(order) for order in (-4, 0, 3, 6, 18, 30))


@pytest.mark.parametrize("order", UNREACHED)
def test_an_unknown_order_is_an_error(order):
    with pytest.raises(ValueError, match=f"order {order} is known"):
        hadamard_matrix(order)


@pytest.mark.parametrize("order", [64, 96, 320, 512, 576, 2880])
def test_rotating_is_the_product_with_the_matrix_and_can_be_taken_back(order):
    x = torch.randn(3, order, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(rotate(x), x @ hadamard_matrix(order), atol=1e-12)
    assert torch.allclose(rotate(rotate(x), inverse=True), x, atol=1e-12)


def test_large_orders_are_products_of_small_matrices(monkeypatch):
    """A dense matrix of a hidden size would take hundreds of megabytes."""
    asked = []
    monkeypatch.setattr(
        "kvq.transforms.hadamard.hadamard_matrix", lambda order: asked.append(order) or hadamard_matrix(order)
    )
    rotate(torch.randn(2, 7168))
    assert max(asked) <= DENSE_ORDER


def test_zero_padding_to_the_next_power_of_two_would_not_be_a_rotation():
    """The trap of common kernels: pad 96 to 128, rotate, cut off."""
    x = torch.randn(4, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    padded = (torch.nn.functional.pad(x, (0, 32)) @ hadamard_matrix(128))[:, :96]
    assert not torch.allclose(padded @ padded.T, x @ x.T, rtol=1e-2)
    assert torch.allclose(rotate(x) @ rotate(x).T, x @ x.T, atol=1e-10)


@pytest.mark.parametrize(
    ("block", "head_dim", "fits"), [(6, 96, "96, 48, 32"), (32, 80, "80, 40, 20"), (128, 64, "64, 32, 16")]
)
def test_a_block_that_does_not_fit_is_refused_with_those_that_do(block, head_dim, fits):
    with pytest.raises(RecipeError, match=f"block={block} does not fit head_dim={head_dim}: use {fits}"):
        build_chain([transform_spec(kind="hadamard", block=block)], head_dim)
