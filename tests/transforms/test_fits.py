"""Closed-form fits against their papers' formulas, written out here in float64, and what they are for."""

import dataclasses
import math

import pytest
import torch

from kvq.errors import DataError, UnsupportedModelError
from kvq.transforms import build_chain, transform_spec
from kvq.transforms.fit import fit_steps
from kvq.transforms.fit_data import measure
from kvq.transforms.hadamard_matrix import hadamard_matrix
from kvq.transforms.objective import attention_error


def fit(data, kind, **settings):
    return transform_spec(kind=kind, **settings).fit(data)


def step(data, kind, **settings):
    spec = transform_spec(kind=kind, **settings)
    return spec.build(len(data.partner), spec.fit(data))


def stacked(data, name):
    """All tokens [heads, n, D] of a tensor, straight from the windows."""
    return torch.cat([getattr(window, name) for window in data.windows], dim=1).double()


def normalised(scale):
    return scale / scale.log().mean(-1, keepdim=True).exp()


def test_smoothing_is_qserves_formula_up_to_a_common_factor(make_fit_data):
    data = make_fit_data()
    keys = stacked(data, "key").abs().amax(1)
    queries = stacked(data, "query").abs().amax(1).unflatten(0, (2, 2)).amax(1)
    pairs = [torch.stack([x[:, :8], x[:, 8:]]).amax(0).repeat(1, 2) for x in (keys, queries)]
    assert torch.allclose(fit(data, "smooth")["scale"].double(), normalised(pairs[0] ** 0.5), rtol=1e-6)
    found = fit(data, "smooth", alpha=0.7, beta=0.4)["scale"].double()
    assert torch.allclose(found, normalised(pairs[0] ** 0.7 / pairs[1] ** 0.4), rtol=1e-6)


def test_smoothing_of_values_is_smoothquants_formula(make_fit_data):
    data = make_fit_data("value")
    values = stacked(data, "value").abs().amax(1)
    columns = data.output.abs().amax(1).unflatten(0, (2, 2)).amax(1).double()
    found = fit(data, "smooth", alpha=0.5, beta=0.5)["scale"].double()
    assert torch.allclose(found, normalised((values / columns) ** 0.5), rtol=1e-6)
    mean = fit(data, "smooth", rule="mean", alpha=0.3)["scale"].double()
    assert torch.allclose(mean, normalised(stacked(data, "value").abs().mean(1) ** 0.3), rtol=1e-6)
    with pytest.raises(DataError, match="needs the weights"):
        fit(make_fit_data("value", output=None), "smooth", alpha=0.5, beta=0.5)


def test_scales_are_shared_where_a_norm_is(make_fit_data):
    scale = fit(make_fit_data(shared=True), "smooth")["scale"]
    assert torch.equal(scale[0], scale[1])
    assert not torch.equal(*fit(make_fit_data(), "smooth")["scale"])


def test_a_channel_that_is_never_used_keeps_its_scale(make_fit_data):
    data = make_fit_data()
    dead = tuple(dataclasses.replace(w, key=w.key.index_fill(-1, torch.tensor([3, 11]), 0.0)) for w in data.windows)
    scale = fit(dataclasses.replace(data, windows=dead), "smooth")["scale"]
    assert bool((scale.isfinite() & (scale > 0)).all())
    # 1 before a common factor is divided out, which is the geometric mean of all.
    keys = torch.cat([window.key for window in dead], dim=1).abs().amax(1)
    expected = torch.maximum(keys[:, :8], keys[:, 8:]).repeat(1, 2).sqrt()
    expected[:, [3, 11]] = 1
    assert torch.allclose(scale, normalised(expected), rtol=1e-5)


def test_a_threshold_touches_only_outliers(make_fit_data):
    data = make_fit_data()
    scale = fit(data, "smooth", rule="threshold")["scale"]
    top = stacked(data, "key").abs().amax(1)
    top = torch.maximum(top[:, :8], top[:, 8:])
    ratio = scale[:, :8] / scale.amin(-1, keepdim=True)
    # Scales above the common one belong to the largest pairs, in proportion to their size.
    for head in range(2):
        touched = ratio[head] > 1.0001
        if touched.any():
            assert top[head][touched].min() >= top[head][~touched].max() - 1e-6
            assert torch.allclose(
                ratio[head][touched] / top[head][touched].float(),
                ratio[head][touched][0] / top[head][touched][0].float(),
                rtol=1e-4,
            )


@pytest.mark.parametrize("side", ["key", "value"])
def test_a_search_is_no_worse_than_any_fixed_exponent(side, make_fit_data):
    data = make_fit_data(side)
    searched = attention_error(data, step(data, "smooth", alpha="search"))
    for alpha in (0.0, 0.25, 0.5, 0.9):
        assert searched <= attention_error(data, step(data, "smooth", alpha=alpha)) + 1e-9
    assert searched < attention_error(data, step(data, "smooth", alpha=0.0))


def test_aligned_keys_have_one_positive_mean_in_both_halves_of_a_pair(make_fit_data):
    data = make_fit_data()
    moved = step(data, "align").forward(stacked(data, "key")).mean(1)
    size = stacked(data, "key").mean(1).unflatten(-1, (2, 8)).norm(dim=1)
    expected = (size / math.sqrt(2)).repeat(1, 2)
    assert torch.allclose(moved, expected, atol=1e-5)


def test_aligning_turns_a_lone_channel_by_its_sign(make_fit_data):
    lone = make_fit_data(partner=torch.arange(16), second=torch.zeros(16, dtype=torch.bool))
    moved = step(lone, "align").forward(stacked(lone, "key")).mean(1)
    assert torch.allclose(moved, stacked(lone, "key").mean(1).abs(), atol=1e-5)


def test_aligning_helps_where_keys_have_means(make_fit_data):
    data = make_fit_data()
    identity = step(data, "smooth", alpha=0.0)
    assert attention_error(data, step(data, "align")) < 0.7 * attention_error(data, identity)


def test_spectral_is_oscars_rotation(make_fit_data):
    data = make_fit_data()
    q = stacked(data, "query").unflatten(0, (2, 2))
    moment = sum(q[h].flatten(0, 1).T @ q[h].flatten(0, 1) / q[h].flatten(0, 1).shape[0] for h in range(2)) / 2
    matrix = fit(data, "spectral")["matrix"][0].double()
    assert torch.allclose(matrix @ matrix.T, torch.eye(16, dtype=torch.float64), atol=1e-6)
    order = [0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15]
    vectors = matrix[:, order] @ hadamard_matrix(16).T
    values = torch.linalg.eigvalsh(moment).flip(0)
    assert torch.allclose(vectors.T @ moment @ vectors, torch.diag(values), atol=1e-4 * float(values[0]))
    # What it is for: every channel of the rotated queries matters alike.
    energy = (matrix.T @ moment @ matrix).diagonal()
    assert torch.allclose(energy, energy.mean().expand(16), rtol=1e-4)


def test_spectral_of_values_weighs_tokens_by_their_logits(make_fit_data):
    data = make_fit_data("value")
    k, v = stacked(data, "key"), stacked(data, "value")
    q = stacked(data, "query").unflatten(0, (2, 2)).flatten(1, 2)
    moment = torch.zeros(16, 16, dtype=torch.float64)
    for h in range(2):
        weights = torch.stack([t @ (q[h].T @ q[h] / len(q[h])) @ t for t in k[h]])
        moment += (v[h].T * (weights / weights.mean())) @ v[h] / len(v[h]) / 2
    matrix = fit(data, "spectral")["matrix"][0].double()
    energy = (matrix.T @ moment @ matrix).diagonal()
    assert torch.allclose(energy, energy.mean().expand(16), rtol=1e-4)


def moments(data):
    """Covariance of keys, second moment of their queries."""
    k, q = stacked(data, "key"), stacked(data, "query").unflatten(0, (2, 2)).flatten(1, 2)
    k = k - k.mean(1, keepdim=True)
    return k.transpose(1, 2) @ k / k.shape[1], q.transpose(1, 2) @ q / q.shape[1]


def product(matrix, stored, reader):
    """tr(P^T C P) tr(P^-1 M P^-T), by head."""
    inverse = torch.linalg.inv(matrix)
    traces = [
        x.diagonal(dim1=-2, dim2=-1).sum(-1) for x in (matrix.mT @ stored @ matrix, inverse @ reader @ inverse.mT)
    ]
    return traces[0] * traces[1]


def test_balance_gives_keys_and_queries_one_covariance(make_fit_data):
    data = make_fit_data()
    matrix = fit(data, "balance")["matrix"].double()
    inverse = torch.linalg.inv(matrix)
    stored, reader = (x + 1e-3 * torch.diag_embed(x.diagonal(dim1=-2, dim2=-1)) for x in moments(data))
    left, right = matrix.mT @ stored @ matrix, inverse @ reader @ inverse.mT
    assert torch.allclose(left, right, atol=1e-4 * float(left.abs().max()))
    # A Hadamard has made all channels alike.
    channels = left.diagonal(dim1=-2, dim2=-1)
    assert torch.allclose(channels, channels.mean(-1, keepdim=True).expand_as(channels), rtol=1e-4)


def test_no_matrix_has_a_smaller_product_of_errors_than_balance(make_fit_data):
    data = make_fit_data()
    stored, reader = moments(data)
    best = product(fit(data, "balance")["matrix"].double(), stored, reader)
    eigenvalues = torch.linalg.eigvals(stored @ reader).real.clamp_min(0)
    assert torch.allclose(best, eigenvalues.sqrt().sum(-1) ** 2, rtol=2e-2)
    generator = torch.Generator().manual_seed(1)
    for scale in (0.0, 0.05, 0.5, 3.0):
        other = torch.eye(16, dtype=torch.float64) + scale * torch.randn(
            2, 16, 16, dtype=torch.float64, generator=generator
        )
        assert bool((product(other, stored, reader) > 0.98 * best).all())


def test_balance_of_values_reads_the_output_projection(make_fit_data):
    data = make_fit_data("value")
    v = stacked(data, "value")
    v = v - v.mean(1, keepdim=True)
    stored = v.transpose(1, 2) @ v / v.shape[1]
    blocks = data.output.double()
    reader = torch.stack([sum(blocks[2 * h + g].T @ blocks[2 * h + g] for g in range(2)) for h in range(2)])
    best = product(fit(data, "balance")["matrix"].double(), stored, reader)
    assert torch.allclose(best, torch.linalg.eigvals(stored @ reader).real.sqrt().sum(-1) ** 2, rtol=2e-2)
    with pytest.raises(DataError, match="needs the weights"):
        fit(make_fit_data("value", output=None), "balance")


def test_shift_is_the_mean_and_bias_is_the_models(make_fit_data):
    data = make_fit_data("value")
    assert torch.allclose(fit(data, "shift")["mean"].double(), stacked(data, "value").mean(1), atol=1e-5)
    bias = torch.randn(2, 16)
    assert torch.equal(fit(make_fit_data(bias=bias), "rope_bias")["bias"], bias)
    with pytest.raises(UnsupportedModelError, match="this model has none"):
        fit(make_fit_data(), "rope_bias")


def test_a_step_sees_what_the_steps_before_it_leave(make_fit_data):
    """Fits after another step equal fits on windows that went through it beforehand."""
    data = make_fit_data()
    specs = [transform_spec(kind="shift"), transform_spec(kind="smooth"), transform_spec(kind="balance")]
    found, _ = fit_steps(specs, data)
    assert set(found) == {"transforms.0.mean", "transforms.1.scale", "transforms.2.matrix"}
    mean = found["transforms.0.mean"].unsqueeze(1)
    moved = tuple(dataclasses.replace(w, key=w.key - mean) for w in data.windows)
    seen = dataclasses.replace(data, windows=moved)
    assert torch.allclose(fit(seen, "smooth")["scale"], found["transforms.1.scale"], rtol=1e-5)
    scale = found["transforms.1.scale"].unsqueeze(1)
    moved = tuple(
        dataclasses.replace(w, key=w.key / scale, query=w.query * scale.repeat_interleave(2, 0)) for w in seen.windows
    )
    last = fit(dataclasses.replace(data, windows=moved), "balance")["matrix"]
    assert torch.allclose(last, found["transforms.2.matrix"], atol=1e-3)


@pytest.mark.parametrize("kind", ["smooth", "align", "shift", "balance"])
def test_given_moments_go_through_a_step_exactly(kind, make_fit_data):
    """Measured on other text than the windows, they are what measuring after the step would have given."""
    data, other = make_fit_data(seed=0), make_fit_data(seed=9)
    given = {name: measure(other.tokens(name)) for name in ("key", "query")}
    moved = dataclasses.replace(data, given=given).through(step(data, kind))
    expected = other.through(step(data, kind))
    for name in ("key", "query"):
        for field in ("mean", "covariance"):
            a, b = getattr(moved, field)(name), getattr(expected, field)(name)
            assert torch.allclose(a, b, atol=1e-5 * float(b.abs().max()) + 1e-9)


def test_a_scale_before_a_shift_is_that_of_what_the_shift_leaves(make_fit_data):
    """Listed first, it folds into the weights; it must not be made for means that will be gone."""
    data = make_fit_data()
    specs = [transform_spec(kind="smooth"), transform_spec(kind="shift"), transform_spec(kind="hadamard")]
    found, seen = fit_steps(specs, data)
    keys = stacked(data, "key")
    distance = (keys - keys.mean(1, keepdim=True)).abs().amax(1)
    expected = torch.maximum(distance[:, :8], distance[:, 8:]).repeat(1, 2).sqrt()
    assert torch.allclose(found["transforms.0.scale"].double(), normalised(expected), rtol=1e-5)
    assert float(seen.mean("key").abs().max()) < 1e-5
    searched = [transform_spec(kind="smooth", alpha="search"), *specs[1:]]
    errors = []
    for chain in (specs, searched):
        tensors, _ = fit_steps(chain, data)
        whole = build_chain(chain, 16, tensors)
        errors.append(attention_error(data, whole))
    assert errors[1] <= errors[0] * 1.001
