"""Learned steps: they stay what they are (orthogonal, invertible), they begin as the identity, and they learn."""

import dataclasses

import pytest
import torch

from kvq.transforms import TRANSFORMS, transform_spec
from kvq.transforms.cayley import cayley, cayley_step, orthonormal
from kvq.transforms.learned import learn
from kvq.transforms.objective import attention_error

SIDES = {"learned_pairs": "key", "learned_scale": "value", "learned_rotation": "value", "learned_matrix": "key"}


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_every_learned_kind_is_tested_here():
    assert set(SIDES) == {kind for kind in TRANSFORMS.shipped() if TRANSFORMS.get(kind).is_learned}


@pytest.mark.parametrize("lr", [1e-3, 0.1, 1e6])
def test_a_cayley_step_stays_orthonormal_and_descends(lr):
    x = orthonormal(random(2, 12, 12))
    target = orthonormal(random(2, 12, 12, seed=1))
    for _ in range(30):
        moved = cayley_step(x, 2 * (x - target), lr)
        assert torch.allclose(moved @ moved.mT, torch.eye(12, dtype=torch.float64).expand(2, -1, -1), atol=1e-2)
        # The longest step that the manifold allows may overshoot.
        assert lr > 1 or (moved - target).square().sum() <= (x - target).square().sum() + 1e-9
        x = orthonormal(moved)


def test_a_small_cayley_step_follows_the_closed_form():
    """Y = (I - a/2 W)^-1 (I + a/2 W) X^T is what the fixed point of the iteration solves."""
    x, gradient, lr = orthonormal(random(8, 8)), random(8, 8, seed=2), 1e-2
    direction = -gradient.T
    a = direction @ x
    b = a - 0.5 * x.T @ (x @ a)
    skew = b - b.T
    unit = torch.eye(8, dtype=torch.float64)
    expected = torch.linalg.solve(unit - lr / 2 * skew, (unit + lr / 2 * skew) @ x.T).T
    assert torch.allclose(cayley_step(x, gradient, lr), expected, atol=1e-7)


def test_orthonormal_keeps_what_is_orthonormal():
    x = orthonormal(random(3, 8, 8))
    assert torch.allclose(orthonormal(x + 1e-9 * random(3, 8, 8, seed=4)), x, atol=1e-8)


def test_the_cayley_transform_of_a_skew_matrix_is_orthogonal():
    p = random(2, 8, 8)
    q = cayley(p - p.mT)
    assert torch.allclose(q @ q.mT, torch.eye(8, dtype=torch.float64).expand(2, -1, -1), atol=1e-12)
    assert torch.equal(cayley(torch.zeros(4, 4)), torch.eye(4))


@pytest.mark.parametrize("kind", SIDES)
def test_a_learned_step_begins_as_the_identity(kind, make_fit_data):
    data = make_fit_data(SIDES[kind])
    spec = transform_spec(kind=kind)
    built = spec.build(16, spec.learnable(data).numbers())
    x = torch.randn(2, 5, 16)
    for function in (built.forward, built.transform_query, built.inverse):
        assert torch.allclose(function(x), x, atol=1e-6)


@pytest.mark.parametrize("kind", SIDES)
def test_learning_lowers_the_error_of_what_the_codec_does(kind, make_fit_data):
    data = make_fit_data(SIDES[kind], bits=3, windows=4)
    spec = transform_spec(kind=kind, steps=60)
    found = learn(spec, data)
    assert len(found.losses) == 60
    assert found.trials[0][0] == 0
    assert found.trials[-1][0] == 60
    built = spec.build(16, found.numbers)
    x = torch.randn(2, 5, 16)
    assert torch.allclose(built.inverse(built.forward(x)), x, atol=1e-4)
    fresh = dataclasses.replace(data, windows=make_fit_data(SIDES[kind], windows=6).windows[4:])
    identity = spec.build(16, spec.learnable(data).numbers())
    assert attention_error(fresh, built) < 0.9 * attention_error(fresh, identity)


@pytest.mark.parametrize("kind", SIDES)
def test_the_same_seed_learns_the_same(kind, make_fit_data):
    data = make_fit_data(SIDES[kind], bits=3)
    first, second, other = (learn(transform_spec(kind=kind, steps=12, seed=s), data) for s in (1, 1, 2))
    assert all(torch.equal(first.numbers[name], second.numbers[name]) for name in first.numbers)
    assert first.losses == second.losses
    assert first.losses != other.losses


def test_rotations_stay_orthogonal_and_pairs_stay_pairs(make_fit_data):
    matrix = learn(transform_spec(kind="learned_rotation", steps=40), make_fit_data("value", bits=2)).numbers["matrix"]
    assert torch.allclose(matrix @ matrix.mT, torch.eye(16).expand(2, -1, -1), atol=1e-5)
    pairs = learn(transform_spec(kind="learned_pairs", steps=40), make_fit_data(bits=3)).numbers
    assert torch.equal(pairs["real"][:, :8], pairs["real"][:, 8:])
    assert torch.equal(pairs["imaginary"][:, :8], -pairs["imaginary"][:, 8:])
    assert pairs["imaginary"].abs().max() > 1e-2


def test_under_a_norm_that_heads_share_pairs_learn_one_scale_and_no_angle(make_fit_data):
    found = learn(transform_spec(kind="learned_pairs", steps=20), make_fit_data(bits=3, shared=True)).numbers
    assert torch.equal(found["real"][0], found["real"][1])
    assert not found["imaginary"].any()
    assert found["real"].std() > 1e-3


def test_nothing_is_kept_that_is_worse_than_the_identity(make_fit_data):
    """8-bit keys leave nothing to learn, and noise must not be kept."""
    data = make_fit_data(bits=8)
    found = learn(transform_spec(kind="learned_matrix", steps=16), data)
    assert min(error for _, error in found.trials) <= found.trials[0][1]
    spec = transform_spec(kind="learned_matrix")
    built = spec.build(16, found.numbers)
    held = dataclasses.replace(data, windows=data.windows[-1:])
    identity = spec.build(16, spec.learnable(data).numbers())
    assert attention_error(held, built) <= attention_error(held, identity) * 1.01
