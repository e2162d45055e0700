"""Law: what is predicted to collapse does, and what is not does not. Models are made so that known recipes collapse.

``benchmarks/diagnosis.py`` compares numbers, on real weights; here tiny random models are told apart.
"""

import pytest
import torch

from kvq.diagnosis import diagnose
from kvq.diagnosis.predict import plan_of
from kvq.eval.likelihood import Windows, score_windows
from kvq.recipe import load_recipe


def losses(model, stats, *names) -> tuple[dict[str, float], dict[str, float]]:
    """(predicted, measured) loss by recipe, in nats per token; measured on other tokens than the statistics."""
    recipes = [load_recipe(name) for name in names]
    predicted = {p.recipe: p.loss for p in diagnose(stats, recipes).predictions}
    tokens = torch.randint(3, 100, (2, 256), generator=torch.Generator().manual_seed(7))
    tokens[:, 0] = 3
    plans = {recipe.name: plan_of(recipe, stats) for recipe in recipes}
    scores = list(score_windows(model, plans, Windows(tokens=tokens, first=[1, 1]), "stream"))
    return predicted, {name: float(torch.cat([s[name].kl for s in scores]).mean()) for name in plans}


@pytest.mark.parametrize("full", [False, True], ids=["default", "full"])
def test_a_plain_model_ranks_recipes_as_they_are(tiny_model, measured, full):
    model = tiny_model(layers=3, head_dim=32)
    predicted, found = losses(model, measured(model, full=full), "int8", "int4", "kivi2", "fp8")
    assert sorted(predicted, key=predicted.get) == sorted(found, key=found.get) == ["int8", "fp8", "int4", "kivi2"]


@pytest.mark.parametrize("full", [False, True], ids=["default", "full"])
def test_a_large_key_bias_is_foreseen(biased, measured, full):
    plain, model = biased(0.0), biased(300.0)
    for name in ("int4", "kivi4"):
        before = losses(plain, measured(plain, full=full), name)
        after = losses(model, measured(model, full=full), name)
        grew = [b[name] / a[name] for a, b in zip(before, after)]
        # One scale for a token's channels is ruined in truth and in the prediction, one for each channel in neither.
        assert all(g > 5 for g in grew) if name == "int4" else all(g < 3 for g in grew), (name, grew)


def test_massive_first_keys_are_foreseen(tiny_model):
    """All attend to a first token whose key is far larger than others': with it exact, the same codec does well."""
    from kvq.calib.collect import collect

    model = tiny_model(layers=3, head_dim=32)
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 5] = 3000.0
        for layer in model.model.layers:
            attention = layer.self_attn
            # The slowest rotary pair carries the first token's key, and every query reads a little of it.
            attention.k_proj.weight[:, 5] = 0
            attention.k_proj.weight.view(-1, 32, 128)[:, 15, 5] = 40.0
            attention.q_proj.weight.view(-1, 32, 128)[:, [15, 31]] *= 0.02
    windows = torch.randint(4, 100, (4, 256), generator=torch.Generator().manual_seed(0))
    windows[:, 0] = 3
    stats = collect(model, windows)
    predicted, found = losses(model, stats, "int4", "sinks4")
    assert predicted["int4"] > predicted["sinks4"]
    assert found["int4"] > found["sinks4"]
