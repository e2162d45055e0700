"""QJL and TurboQuant's sign term: unbiased estimates of products, with the variance that the theory says."""

import math

import pytest
import torch
from made_pages import pages_of

from kvq.codecs import codec_spec
from kvq.codecs.projections import directions, from_bytes, project, to_bytes, unbiasing
from kvq.codecs.sketch import SketchCodec

D = 64
SEEDS = 1000


def vectors(seed=0, count=1):
    x = torch.randn(2, count, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x / x.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("count", [8, 64, 100, 256])
def test_directions_are_orthogonal_in_blocks_and_of_length_sqrt_d(count):
    s = directions(D, count, 3)
    assert s.shape == (D, count)
    assert torch.allclose(s.norm(dim=0), torch.full((count,), math.sqrt(D), dtype=torch.float64))
    block = s[:, : min(D, count)]
    assert torch.allclose(block.T @ block, D * torch.eye(block.shape[1], dtype=torch.float64), atol=1e-9)
    assert not torch.equal(s, directions(D, count, 4))


def test_the_constant_is_that_of_orthogonal_directions():
    """sqrt(pi / 2), QJL's constant for Gaussian directions, would be off by 1 / (4 d)."""
    assert math.sqrt(math.pi / 2) / unbiasing(D) - 1 == pytest.approx(1 / (4 * D), rel=0.05)


@pytest.mark.parametrize("bits", [2, 4])
def test_the_mean_over_seeds_is_the_product_and_the_variance_falls_with_the_sketch(bits):
    k, q = vectors()
    found = torch.stack(
        [
            q @ codec.decode(codec.encode(k), torch.float64).T
            for codec in (SketchCodec(bits=bits, head_dim=D, seed=seed) for seed in range(SEEDS))
        ]
    ).flatten()
    exact = (q @ k.T).item()
    deviation = found.std().item()
    assert abs(found.mean().item() - exact) < 4 * deviation / math.sqrt(SEEDS)
    # QJL, lemma 3.5: variance at most pi / (2 m) for unit vectors; orthogonal directions do not exceed it.
    assert deviation**2 < 1.1 * math.pi / 2 / (bits * D)
    assert deviation**2 > 0.3 * math.pi / 2 / (bits * D)


def test_the_estimator_is_the_published_formula():
    """<q, k> ~ c / m ||k|| sum_i (S^T q)_i sign((S^T k)_i), with an exact query."""
    k, q = vectors(seed=5, count=64)
    codec = SketchCodec(bits=3, head_dim=D, seed=9)
    pages = pages_of(k.view(1, 1, 64, D) * 7, codec)
    s = directions(D, 3 * D, 9)
    norm = (k * 7).norm(dim=-1).half().double()
    expected = (q @ s) @ (k @ s).sign().T * norm * unbiasing(D) / (3 * D)
    assert torch.allclose(codec.scores(pages, "key", q.view(1, 1, 64, D))[0, 0], expected)


def test_outlier_channels_have_a_sketch_of_their_own(numbers):
    x = numbers(1, 32, head_dim=D)
    x[..., 5] *= 30
    x[..., 40] *= 20
    with_them = SketchCodec(bits=4, head_dim=D, outlier_channels=2, outlier_bits=2, group=32)
    without = SketchCodec(bits=8, head_dim=D)
    encoded = with_them.encode(x)
    assert encoded.sections["outlier_channels"].flatten().unique().tolist() == [5, 40]
    q = numbers(1, 50, seed=8, head_dim=D)

    def error(codec):
        return (q @ (codec.decode(codec.encode(x), torch.float64) - x).mT).square().mean()

    assert error(with_them) < 0.7 * error(without)


def test_bytes_hold_signs_lowest_bit_first():
    bits = torch.tensor([[1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 1]], dtype=torch.bool)
    assert to_bytes(bits).tolist() == [[1, 131]]
    assert torch.equal(from_bytes(to_bytes(bits), torch.float32) > 0, bits)


def test_a_sign_does_not_depend_on_neighbours():
    x = torch.randn(300, D, generator=torch.Generator().manual_seed(0))
    together = project(x, 2 * D, 1)
    assert torch.equal(together[17:18], project(x[17:18], 2 * D, 1))
    assert torch.equal(together[:31], project(x[:31], 2 * D, 1))


def turboquant(bits, seed=None):
    settings = {"codec": "book", "bits": bits, "levels": "lloyd_max", "scale": "unit", "norm": {"over": "head"}}
    return codec_spec(**settings, signs=None if seed is None else {"seed": seed}).build(D)


def test_the_sign_term_makes_products_unbiased_and_adds_to_the_error():
    """TurboQuant, theorem 2: Q_prod is unbiased where Q_mse shrinks products, at the price of variance."""
    k, q = vectors(seed=2)
    q = k + 0.3 * q
    exact = (q @ k.T).item()
    plain = (q @ turboquant(2).decode(turboquant(2).encode(k), torch.float64).T).item()
    found = torch.stack(
        [q @ codec.decode(codec.encode(k), torch.float64).T for codec in (turboquant(2, seed) for seed in range(SEEDS))]
    ).flatten()
    assert abs(found.mean().item() - exact) < 4 * found.std().item() / math.sqrt(SEEDS)
    assert abs(plain - exact) > 10 * abs(found.mean().item() - exact)
    assert found.std() > 0
