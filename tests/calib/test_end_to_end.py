"""Learning on logits: the trial attention is what scoring reads, the loss falls, interruptions change nothing."""

import pytest
import torch

from kvq.cache import make_plan
from kvq.calib import end_to_end
from kvq.calib.artefacts import fit_artefacts
from kvq.calib.collect import collect
from kvq.calib.end_to_end import learn_end_to_end
from kvq.calib.learn import learn_fits
from kvq.calib.needs import needs_of
from kvq.eval.two_view import two_view
from kvq.models.describe import describe
from kvq.recipe import parse_recipe

CODEC = {"codec": "affine", "bits": 2, "axis": "token", "group": "head"}
STEPS = 12


def recipe(keys=(), values=(), **settings):
    data = {"name": "mine", "key": CODEC, "value": CODEC, "transforms": {"key": list(keys), "value": list(values)}}
    return parse_recipe(data | settings, source="mine")


SPIN = recipe([{"kind": "hadamard"}], [{"kind": "hadamard"}, {"kind": "learned_rotation", "steps": 4}])
ALL = recipe(
    [{"kind": "align"}, {"kind": "learned_pairs", "steps": 4}, {"kind": "learned_matrix", "steps": 4}],
    [{"kind": "learned_scale", "steps": 4}, {"kind": "learned_rotation", "steps": 4}],
    tokens={"sinks": 1, "window": 4},
)


@pytest.fixture
def made(tiny_model, tiny_checkpoint):
    """Factory ``made(recipe) -> (model, folder, spec, statistics, tokens)``."""

    def make(mine, **settings):
        model = tiny_model(**({"head_dim": 16, "layers": 2} | settings))
        spec = describe(model.config)
        tokens = torch.randint(3, 128, (6, 32), generator=torch.Generator().manual_seed(0))
        stats = collect(model, tokens, needs=needs_of(mine, spec))
        return model, tiny_checkpoint(model), spec, stats, tokens

    return make


def divergence(model, plan, tokens):
    """KL(model || model with the recipe's cache), nats a token, by two-view scoring."""
    with torch.no_grad():
        exact = model(tokens, use_cache=False).logits.log_softmax(-1)
        with two_view(model, plan):
            found = model(tokens, use_cache=False).logits.log_softmax(-1)
    return float((exact.exp() * (exact - found)).sum(-1).mean())


@pytest.mark.parametrize("mine", [SPIN, ALL], ids=["spin", "all"])
def test_the_loss_is_the_divergence_that_scoring_finds(mine, made, tmp_path):
    """At the start, before anything moved, on one text."""
    model, folder, spec, stats, tokens = made(mine)
    stats = learn_fits(mine, spec, stats, folder, state_folder=tmp_path / "state")
    plan = make_plan(mine, spec, fit_artefacts(mine, spec, stats, folder))
    expected = divergence(model, plan, tokens[:1])
    layers = end_to_end._layers(mine, spec, stats, folder)
    found = end_to_end._step(model, layers, tokens[:1])
    assert expected > 1e-3
    # Half-precision metadata is left out of what has gradients.
    assert found == pytest.approx(expected, rel=0.05)
    assert all(
        p.grad is not None for layer in layers.values() for le in layer.learnables.values() for p in le.parameters
    )


@pytest.mark.parametrize("mine", [SPIN, ALL], ids=["spin", "all"])
def test_learning_together_lowers_the_divergence(mine, made, tmp_path):
    model, folder, spec, stats, tokens = made(mine)
    stats = learn_fits(mine, spec, stats, folder, state_folder=tmp_path / "state")
    before = make_plan(mine, spec, fit_artefacts(mine, spec, stats, folder))
    learned = learn_end_to_end(model, mine, stats, tokens, folder, state_folder=tmp_path / "state", steps=40)
    after = make_plan(mine, spec, fit_artefacts(mine, spec, learned, folder))
    assert divergence(model, after, tokens) < 0.97 * divergence(model, before, tokens)
    x = torch.randn(2, 5, 16)
    for sides in after.chains.values():
        for chain in sides.values():
            assert torch.allclose(chain.inverse(chain.forward(x)), x, atol=1e-3)
    facts = [fit.facts for fit in learned.fits.values() if fit.facts["objective"] == "logits"]
    assert facts
    assert len(facts[0]["losses"]) == 40


def test_the_model_is_given_back_as_it_was(made, tmp_path):
    model, folder, _, stats, tokens = made(SPIN)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    attention = model.config._attn_implementation
    learn_end_to_end(model, SPIN, stats, tokens, folder, state_folder=tmp_path, steps=2)
    assert model.config._attn_implementation == attention
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name])
        assert parameter.requires_grad
        assert parameter.grad is None


@pytest.mark.parametrize("mine", [SPIN, ALL], ids=["spin", "all"])
def test_an_interrupted_run_goes_on_and_ends_alike(mine, made, tmp_path, monkeypatch):
    model, folder, _, stats, tokens = made(mine)
    settings = {"steps": STEPS, "seed": 3}
    whole = learn_end_to_end(model, mine, stats, tokens, folder, state_folder=tmp_path / "whole", **settings)

    def interrupt(done, total):
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn_end_to_end(
            model, mine, stats, tokens, folder, state_folder=tmp_path / "s", progress=interrupt, **settings
        )
    seen = []
    again = learn_end_to_end(
        model, mine, stats, tokens, folder, state_folder=tmp_path / "s", progress=lambda *x: seen.append(x), **settings
    )
    assert seen[0] == (7, STEPS)
    assert again.fits.keys() == whole.fits.keys()
    for name, fit in whole.fits.items():
        assert again.fits[name].facts == fit.facts
        assert all(torch.equal(again.fits[name].tensors[n], tensor) for n, tensor in fit.tensors.items())
    # A state of another run is not taken up.
    seen.clear()
    learn_end_to_end(
        model, mine, stats, tokens, folder, state_folder=tmp_path / "s", steps=2, progress=lambda *x: seen.append(x)
    )
    assert seen[0] == (0, 2)


def test_a_recipe_without_learned_steps_learns_nothing(made, tmp_path):
    mine = recipe([{"kind": "hadamard"}])
    model, folder, _, stats, tokens = made(SPIN)
    assert learn_end_to_end(model, mine, stats, tokens, folder, state_folder=tmp_path) is stats
