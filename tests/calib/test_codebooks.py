"""Histograms that codebooks are learned from: against gradients taken the plain way, and the laws of calibration."""

import dataclasses

import pytest
import torch
from transformers import DynamicCache

from kvq.cache import make_plan
from kvq.calib.artefacts import check_artefacts, fit_artefacts, needed_artefacts
from kvq.calib.codebooks import FIT, books_of, learn_codebooks
from kvq.calib.collect import collect
from kvq.calib.needs import needs_of
from kvq.calib.observers.bins import BINS, END, Bins, bin_middles
from kvq.codecs.kmeans import levels_of
from kvq.codecs.levels import midpoints
from kvq.errors import DataError
from kvq.models.describe import describe
from kvq.models.rope import rope_of
from kvq.recipe import load_recipe

RECIPES = [load_recipe(name) for name in ("kvquant3", "kvquant2-dense")]


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(layers=2, head_dim=16)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, 120, (6, 40), generator=torch.Generator().manual_seed(0))


def measured(model, tokens, valid=None, recipes=RECIPES):
    spec = describe(model.config)
    needs = frozenset().union(*(needs_of(recipe, spec) for recipe in recipes))
    return collect(model, tokens, valid=valid, needs=needs, strict=True)


def learned(model, tokens, valid=None, recipes=RECIPES, **settings):
    return learn_codebooks(model, recipes, measured(model, tokens, valid, recipes), tokens, valid=valid, **settings)


@pytest.fixture(scope="module")
def stats(model, tokens):
    return learned(model, tokens)


def slopes(model, row):
    """Keys before RoPE, values, and the loss's gradients at them, with hooks on the projections."""
    seen = {}

    def keep(name, index):
        def hook(module, args, out):
            out.retain_grad()
            seen[index, name] = out

        return hook

    hooks = [
        projection.register_forward_hook(keep(name, index))
        for index, layer in enumerate(model.model.layers)
        for name, projection in (("key", layer.self_attn.k_proj), ("value", layer.self_attn.v_proj))
    ]
    logits = model(row, past_key_values=DynamicCache(config=model.config)).logits[0, :-1]
    (-torch.log_softmax(logits, -1).gather(-1, row[0, 1:, None])).sum().backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    heads = model.config.num_key_value_heads
    return {
        where: tuple(x[0].unflatten(-1, (heads, -1)).transpose(0, 1).detach() for x in (out, out.grad))
        for where, out in seen.items()
    }


def test_dense_codebooks_count_and_weigh_every_number_after_the_sink(model, tokens, stats):
    """Histograms against gradients at the projections' outputs: squares times the scale's square, by bin."""
    recipe = RECIPES[1]
    spec = describe(model.config)
    artefacts = fit_artefacts(recipe, spec, stats)
    books = books_of([recipe], spec)
    expected = {}
    for row in tokens.split(1):
        for (index, side), (x, slope) in slopes(model, row).items():
            x, slope = x[:, 1:].double(), slope[:, 1:].double()
            if side == "key":
                scale, middle = artefacts[f"layers.{index}.key.range"].unsqueeze(1).unbind(-1)
            else:
                low, high = x.amin((0, 2), keepdim=True), x.amax((0, 2), keepdim=True)
                scale, middle = ((high - low) / 2).half().double(), ((high + low) / 2).half().double()
            z = ((x - middle) / scale).flatten()
            where = ((z + END) * BINS / (2 * END)).long().clamp(0, BINS - 1)
            weights = (slope * scale).square().flatten()
            part = torch.stack([torch.bincount(where, minlength=BINS).double(), torch.bincount(where, weights, BINS)])
            expected[index, side] = expected.get((index, side), 0) + part
    for index, own in books.items():
        for book in own:
            counts, weights = (
                stats.fits[FIT].tensors[f"layers.{index}.{book.name}.{w}"] for w in ("counts", "weights")
            )
            assert counts.sum() == 6 * 39 * 2 * 16
            wanted = expected[index, book.side]
            # Numbers at an edge may fall on either side of it, in float32.
            assert (counts - wanted[0]).abs().sum() <= 0.01 * counts.sum()
            middle = bin_middles()
            for found, other in ((counts, wanted[0]), (weights, wanted[1])):
                assert found.sum() == pytest.approx(other.sum().item(), rel=1e-3)
                assert (found * middle).sum() == pytest.approx(
                    (other * middle).sum().item(), rel=1e-2, abs=1e-3 * other.sum().item()
                )


def test_outliers_are_not_counted_and_everything_else_is(model, stats):
    """Two of 32 numbers of a token are stored beside the codes; no other is left out, inside static ranges or not."""
    for book in books_of([RECIPES[0]], describe(model.config))[0]:
        assert stats.fits[FIT].tensors[f"layers.0.{book.name}.counts"].sum() == 6 * 39 * 30


def test_levels_are_the_weighted_k_means_of_the_histogram(model, stats):
    recipe, spec = RECIPES[0], describe(model.config)
    artefacts = fit_artefacts(recipe, spec, stats)
    assert artefacts.keys() == needed_artefacts(recipe, spec).keys()
    assert check_artefacts(artefacts, needed_artefacts(recipe, spec)) is None
    book = next(b for b in books_of([recipe], spec)[1] if b.side == "value")
    weights = stats.fits[FIT].tensors[f"layers.1.{book.name}.weights"]
    levels = artefacts["layers.1.value.levels"]
    assert torch.allclose(levels, levels_of(bin_middles(), weights, 8), atol=2e-2)
    assert torch.allclose(artefacts["layers.1.value.edges"], midpoints(levels))
    plain = fit_artefacts(recipe.override({"value.weights": None}), spec, stats)["layers.1.value.levels"]
    assert not torch.allclose(plain, levels, atol=1e-3)


def test_one_pass_serves_every_width_and_q_norm(model, stats):
    spec = describe(model.config)
    for settings in (
        {"key.bits": 4, "value.bits": 2},
        {"key.q_norm": True},
        {"value.low_rank": {"rank": 1, "block": 16}},
    ):
        assert fit_artefacts(RECIPES[0].override(settings), spec, stats)
    moved = fit_artefacts(RECIPES[0].override({"key.q_norm": True}), spec, stats)
    still = fit_artefacts(RECIPES[0], spec, stats)
    assert torch.equal(moved["layers.0.key.edges"], still["layers.0.key.edges"])
    assert not torch.equal(moved["layers.0.key.levels"], still["layers.0.key.levels"])


def test_what_was_not_learned_is_refused_with_the_way_out(model, stats):
    spec = describe(model.config)
    for recipe in (RECIPES[0].override({"tokens.sinks": 0}), load_recipe("kvquant3").override({"key.placement": None})):
        with pytest.raises(DataError, match=r"--for|no 'key"):
            fit_artefacts(recipe, spec, stats)
    with pytest.raises(DataError, match="hold no codebook for the keys of layer 0"):
        fit_artefacts(RECIPES[0], spec, measured(model, torch.randint(3, 120, (2, 30))))


def test_a_codebook_without_gradients_is_not_taken_for_one_with_them(model, tokens):
    plain = RECIPES[1].override({"key.weights": None, "value.weights": None})
    stats = learned(model, tokens, recipes=[plain])
    assert stats.fits[FIT].facts["weighted"] is False
    assert fit_artefacts(plain, describe(model.config), stats)
    with pytest.raises(DataError, match="without gradients"):
        fit_artefacts(RECIPES[1], describe(model.config), stats)


def test_histograms_of_another_size_are_refused(model, stats):
    fit = stats.fits[FIT]
    shorter = dataclasses.replace(fit, tensors={name: x[::2] for name, x in fit.tensors.items()})
    with pytest.raises(DataError, match="another version of kvq"):
        fit_artefacts(RECIPES[0], describe(model.config), stats.with_fit(FIT, shorter))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model, tokens, side):
    """Against the same windows, cut, one by one."""
    lengths = [40, 17, 29]
    rows = [tokens[i : i + 1, :n] for i, n in enumerate(lengths)]
    padded, valid = torch.full((3, 40), 2), torch.zeros(3, 40, dtype=torch.bool)
    for i, n in enumerate(lengths):
        span = slice(0, n) if side == "right" else slice(40 - n, 40)
        padded[i, span], valid[i, span] = rows[i], True
    found = learned(model, padded, valid).fits[FIT].tensors
    ranges = measured(model, padded, valid)
    alone = [learn_codebooks(model, RECIPES, ranges, row).fits[FIT].tensors for row in rows]
    for name, x in found.items():
        total = sum(part[name] for part in alone)
        assert (x - total).abs().sum() <= 1e-2 * total.sum(), name


def test_an_interrupted_run_ends_with_the_same_numbers(model, tokens, tmp_path, stats):
    class Stop(Exception):
        pass

    def stop(done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learned(model, tokens, state_folder=tmp_path / "state", progress=stop)
    seen = []
    again = learned(model, tokens, state_folder=tmp_path / "state", progress=lambda done, total: seen.append(done))
    assert seen[0] == 4
    for name, x in stats.fits[FIT].tensors.items():
        assert torch.equal(again.fits[FIT].tensors[name], x)


def test_the_model_is_given_back(model, tokens):
    before = [weight.requires_grad for weight in model.parameters()]
    learned(model, tokens[:1])
    assert [weight.requires_grad for weight in model.parameters()] == before
    assert all(weight.grad is None for weight in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks


def test_head_groups_have_codebooks_of_their_own(model, tokens):
    recipe = RECIPES[1].override({"layers.0/1.value.bits": 4})
    stats, spec = learned(model, tokens, recipes=[recipe]), describe(model.config)
    artefacts = fit_artefacts(recipe, spec, stats)
    assert artefacts["layers.0.value.levels"].shape == (4,)
    assert artefacts["layers.0.value.group1.levels"].shape == (16,)
    assert artefacts["layers.0.key.group1.range"].shape == (1, 16, 2)
    groups = make_plan(recipe, spec, artefacts).layers[0]
    assert [group.codecs["value"].bits for group in groups] == [2, 4]


def test_a_file_keeps_what_was_learned(stats, tmp_path):
    stats.save(tmp_path / "stats.safetensors")
    again = type(stats).load(tmp_path / "stats.safetensors")
    assert again.fits[FIT].facts == stats.fits[FIT].facts
    assert all(torch.equal(again.fits[FIT].tensors[n], x) for n, x in stats.fits[FIT].tensors.items())


def test_bins_join_as_if_seen_together():
    x = torch.randn(3, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[0, :5] = torch.nan
    w = torch.rand(3, 100, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole, parts = Bins.observe(x, w), [Bins.observe(a, b) for a, b in zip(x, w)]
    joined = parts[0].merge(parts[1]).merge(parts[2])
    assert torch.equal(joined.counts, whole.counts)
    assert torch.allclose(joined.weights, whole.weights)
    assert whole.counts.sum() == 295
    ends = Bins.observe(torch.tensor([-END, 0.0, END, 9.0])).counts
    assert {i: int(ends[i]) for i in ends.nonzero().flatten().tolist()} == {0: 1, BINS // 2: 1, BINS - 1: 2}


def test_gradients_before_rope_follow_a_length_that_rope_adds(tiny_model, tiny_config, tokens):
    """YaRN scales what it rotates, so its transpose is not its inverse."""
    parameters = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    model = tiny_model(tiny_config(layers=1, rope_parameters=parameters, max_length=256), seed=2)
    assert rope_of(model.config).factor != 1
    stats, spec = learned(model, tokens[:1], recipes=[RECIPES[1]]), describe(model.config)
    _, slope = slopes(model, tokens[:1])[0, "key"]
    scale = fit_artefacts(RECIPES[1], spec, stats)["layers.0.key.range"][:, :, 0].unsqueeze(1)
    book = next(b for b in books_of([RECIPES[1]], spec)[0] if b.side == "key")
    found = stats.fits[FIT].tensors[f"layers.0.{book.name}.weights"].sum()
    assert found == pytest.approx((slope[:, 1:].double() * scale).square().sum().item(), rel=1e-3)
