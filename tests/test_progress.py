"""Progress inside a step: who listens hears of the layers that ran, and the answers are the same."""

import pytest
import torch

from kvq.cache import make_plan
from kvq.calib.collect import collect
from kvq.eval.continuations import Question, score_continuations
from kvq.eval.likelihood import Windows, score_windows
from kvq.models.decoder import decoder_layers, telling
from kvq.models.describe import describe
from kvq.progress import is_heard, listening, tell
from kvq.recipe import load_recipe
from kvq.searching.measure import Probe

LAYERS = 3


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(layers=LAYERS, head_dim=32)


def told(work):
    """What was told while ``work`` ran, and what it gives."""
    heard = []
    with listening(heard.append):
        found = work()
    return heard, found


def test_nobody_listens_and_nothing_is_counted(model):
    with telling(model, 1):
        assert not any(layer._forward_hooks for layer in decoder_layers(model))
    tell(0.5)
    assert not is_heard()


def test_a_layer_that_ran_is_its_share_of_all_forwards(model):
    tokens = torch.arange(3, 20)[None]
    heard, _ = told(lambda: _twice(model, tokens))
    assert heard == pytest.approx([4 * n / (2 * LAYERS) for n in range(1, 2 * LAYERS + 1)])
    assert not any(layer._forward_hooks for layer in decoder_layers(model))


@torch.no_grad()
def _twice(model, tokens):
    with telling(model, 2, steps=4):
        model(tokens)
        model(tokens)


def test_calibration_tells_of_its_batches(model):
    windows = torch.randint(3, 100, (4, 64), generator=torch.Generator().manual_seed(0))
    heard, stats = told(lambda: collect(model, windows, batch_size=2))
    # Two batches of two windows, each layer of each.
    assert heard == pytest.approx([2 * n / LAYERS for n in (1, 2, 3)] * 2)
    assert stats.layers[0].keys() == collect(model, windows, batch_size=2).layers[0].keys()


def test_scoring_tells_of_baseline_and_plans(model):
    plan = make_plan(load_recipe("int4"), describe(model.config))
    windows = Windows(tokens=torch.arange(3, 67)[None], first=[1])
    heard, ((found),) = told(lambda: list(score_windows(model, {"a": plan, "b": plan}, windows)))
    assert heard == pytest.approx([n / (3 * LAYERS) for n in range(1, 3 * LAYERS + 1)])
    (silent,) = score_windows(model, {"a": plan, "b": plan}, windows)
    assert torch.equal(found["a"].kl, silent["a"].kl)


def test_questions_tell_of_their_batch(model):
    question = Question(context=tuple(range(3, 40)), continuations=((5, 6), (7,)))
    heard, _ = told(lambda: score_continuations(model, None, [question]))
    assert heard == pytest.approx([2 * n / LAYERS for n in (1, 2, 3)])


def test_a_search_tells_of_the_options_of_a_layer(model):
    full, spec = make_plan(load_recipe("int4"), describe(model.config)), describe(model.config)
    plan = type(full)(recipe=full.recipe, model=spec, layers={1: full.layers[1]})
    heard, found = told(lambda: Probe(model, torch.arange(3, 67)[None]).damages({"a": plan, "b": plan}))
    assert heard == pytest.approx([n / (2 * LAYERS) for n in range(1, 2 * LAYERS + 1)])
    assert found["a"] == found["b"]
