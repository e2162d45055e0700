"""Transforms fitted and learned on a statistics file: what they read, and that interrupted learning goes on."""

import dataclasses
import json

import pytest
import torch

from kvq.cache import make_plan
from kvq.calib.artefacts import check_artefacts, fit_artefacts, needed_artefacts
from kvq.calib.collect import collect
from kvq.calib.fit_source import FitSource
from kvq.calib.learn import fit_name, learn_fits, learned_steps
from kvq.calib.needs import needs_of
from kvq.calib.stats import Stats
from kvq.errors import DataError, RecipeError, UnsupportedModelError
from kvq.models.describe import describe
from kvq.recipe import parse_recipe

CODEC = {"codec": "affine", "bits": 3, "axis": "token", "group": "head"}
CHAINS = {
    "smooth": ([{"kind": "smooth", "alpha": "search"}], [{"kind": "smooth", "alpha": 0.5, "beta": 0.5}]),
    "align": ([{"kind": "align"}, {"kind": "smooth"}], [{"kind": "hadamard"}, {"kind": "shift"}]),
    "spectral": ([{"kind": "spectral"}], [{"kind": "spectral"}]),
    "balance": ([{"kind": "shift"}, {"kind": "balance"}], [{"kind": "balance"}]),
    "learned": (
        [{"kind": "align"}, {"kind": "learned_pairs", "steps": 4}],
        [{"kind": "hadamard"}, {"kind": "learned_rotation", "steps": 4}],
    ),
}


def recipe(keys=(), values=(), **settings):
    transforms = {"key": list(keys), "value": list(values)}
    data = {"name": "mine", "key": CODEC, "value": CODEC, "transforms": transforms}
    return parse_recipe(data | settings, source="mine")


@pytest.fixture
def measured(tiny_model, tiny_checkpoint):
    """Factory ``measured(recipe, **model settings) -> (folder, spec, statistics for the recipe)``."""

    def make(mine, **settings):
        model = tiny_model(**settings)
        spec = describe(model.config)
        windows = torch.randint(3, 128, (6, 40), generator=torch.Generator().manual_seed(0))
        return tiny_checkpoint(model), spec, collect(model, windows, needs=needs_of(mine, spec))

    return make


@pytest.mark.parametrize("name", CHAINS)
def test_what_a_recipe_needs_is_enough_for_its_transforms(name, measured, tmp_path):
    mine = recipe(*CHAINS[name])
    folder, spec, stats = measured(mine)
    stats = learn_fits(mine, spec, stats, folder, state_folder=tmp_path / "state")
    found = fit_artefacts(mine, spec, stats, folder)
    assert check_artefacts(found, needed_artefacts(mine, spec)) is None
    chains = make_plan(mine, spec, found).chains
    x = torch.randn(2, 5, 16)
    for sides in chains.values():
        for chain in sides.values():
            assert torch.allclose(chain.inverse(chain.forward(x)), x, atol=1e-3)


def test_fits_survive_the_statistics_file(measured, tmp_path):
    mine = recipe(*CHAINS["learned"])
    folder, spec, stats = measured(mine)
    learned = learn_fits(mine, spec, stats, folder, state_folder=tmp_path / "state")
    learned.save(tmp_path / "stats.safetensors")
    again = Stats.load(tmp_path / "stats.safetensors")
    first, second = (fit_artefacts(mine, spec, s, folder) for s in (learned, again))
    assert all(torch.equal(first[name], second[name]) for name in first)
    facts = again.fits[fit_name(mine.for_head(0, 0, 2), "value", 1)].facts
    assert facts["step"] == {"kind": "learned_rotation", "steps": 4}
    assert [len(facts["layers"][i]["losses"]) for i in ("0", "1")] == [4, 4]


def test_an_unlearned_step_names_the_way_to_it(measured):
    mine = recipe(*CHAINS["learned"])
    folder, spec, stats = measured(mine)
    with pytest.raises(RecipeError, match=r"'learned_pairs' of recipe 'mine' was not learned .* --for mine"):
        fit_artefacts(mine, spec, stats, folder)
    other = dataclasses.replace(mine, key=dataclasses.replace(mine.key, bits=4))
    assert fit_name(other.for_head(0, 0, 2), "key", 1) != fit_name(mine.for_head(0, 0, 2), "key", 1)
    assert fit_name(other.for_head(0, 0, 2), "value", 1) == fit_name(mine.for_head(0, 0, 2), "value", 1)


def test_interrupted_learning_goes_on_and_ends_alike(measured, tmp_path):
    mine = recipe(*CHAINS["learned"])
    folder, spec, stats = measured(mine, layers=3)
    whole = learn_fits(mine, spec, stats, folder, state_folder=tmp_path / "whole")
    seen = []

    def interrupt(done, total):
        seen.append((done, total))
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn_fits(mine, spec, stats, folder, state_folder=tmp_path / "state", progress=interrupt)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "state").iterdir()}
    assert len(kept) == 3
    again = learn_fits(mine, spec, stats, folder, state_folder=tmp_path / "state")
    assert all((tmp_path / "state" / name).stat().st_mtime_ns == time for name, time in kept.items())
    assert again.fits.keys() == whole.fits.keys()
    for name, fit in again.fits.items():
        assert fit.facts == whole.fits[name].facts
        assert all(torch.equal(tensor, whole.fits[name].tensors[n]) for n, tensor in fit.tensors.items())
    assert seen[0] == (0, len(list(learned_steps(mine, spec)))) == (0, 6)


def test_a_state_of_other_statistics_or_a_broken_one_is_not_used(measured, tmp_path):
    mine = recipe(*CHAINS["learned"])
    folder, spec, stats = measured(mine)
    state = tmp_path / "state"
    first = learn_fits(mine, spec, stats, folder, state_folder=state)
    for path in state.iterdir():
        path.write_bytes(path.read_bytes()[:-7])
    second = learn_fits(mine, spec, stats, folder, state_folder=state)
    assert json.dumps([f.facts for f in first.fits.values()]) == json.dumps([f.facts for f in second.fits.values()])
    other = dataclasses.replace(stats, model="other")
    before = {path.name: path.stat().st_mtime_ns for path in state.iterdir()}
    learn_fits(mine, spec, other, folder, state_folder=state)
    assert all((state / name).stat().st_mtime_ns > time for name, time in before.items())


def test_fit_data_hold_the_weights_that_read_the_cache(measured):
    mine = recipe([{"kind": "balance"}], [{"kind": "balance"}], tokens={"sinks": 2, "window": 0})
    folder, spec, stats = measured(mine, attention_bias=True)
    head = mine.for_head(1, 0, 2)
    codec = head.key.build(16)
    found = FitSource(spec, stats, folder).fit_data(spec.full_layers[1], "key", head, codec)
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    output = weights["model.layers.1.self_attn.o_proj.weight"]
    values = FitSource(spec, stats, folder).fit_data(spec.full_layers[1], "value", head, codec)
    assert torch.equal(values.output[3], output[:, 48:64])
    # Balanced keys are fitted on queries alone.
    assert found.output is None
    assert torch.equal(found.bias[1], weights["model.layers.1.self_attn.k_proj.bias"][16:32])
    assert (found.heads, found.exact, found.window, found.windows) == (2, 2, 0, ())
    assert FitSource(spec, stats, None).fit_data(spec.full_layers[1], "value", head, codec).output is None
    # Without token vectors, magnitudes and moments still come from all of the text.
    assert torch.allclose(found.mean("key").float(), stats.layers[1]["key.range"].mean, atol=1e-6)
    with pytest.raises(DataError, match="no token vectors"):
        found.absmean("key")


def test_a_bias_that_is_not_there_cannot_be_taken_away(measured):
    mine = recipe([{"kind": "rope_bias"}])
    folder, spec, stats = measured(recipe([{"kind": "shift"}]))
    with pytest.raises(UnsupportedModelError, match="this model has none"):
        fit_artefacts(mine, spec, stats, folder)


def test_scales_of_float8_are_those_of_what_is_stored(measured):
    """The range after a transform decides, not that of the keys as the model gives them."""
    eight = {"codec": "float8", "scale": "calibrated"}
    mine = recipe([{"kind": "align"}, {"kind": "smooth"}], [{"kind": "hadamard"}], key=eight, value=eight)
    folder, spec, stats = measured(mine)
    found = fit_artefacts(mine, spec, stats, folder)
    chains = make_plan(mine, spec, found).chains
    for layer in (0, 1):
        windows = list(stats.layers[layer]["reservoir"].windows())
        for side, place in (("key", 1), ("value", 2)):
            top = max(float(chains[layer][side].forward(window[place].float()).abs().max()) for window in windows)
            assert float(found[f"layers.{layer}.{side}.scale"]) == pytest.approx(top / 448, rel=1e-4)
