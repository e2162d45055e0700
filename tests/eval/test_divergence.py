import pytest
import torch

from kvq.cache import make_plan
from kvq.eval.divergence import divergence
from kvq.eval.likelihood import WindowScore, score_windows
from kvq.eval.perplexity import cut_windows
from kvq.integrations.two_view import two_view
from kvq.models.describe import describe
from kvq.recipe import load_recipe


def test_kl_and_top1_equal_the_definition(tiny_model):
    model = tiny_model()
    plan = make_plan(load_recipe("int4"), describe(model.config))
    ids = torch.randint(3, 120, (77,), generator=torch.Generator().manual_seed(0)).tolist()
    windows = cut_windows(ids, 33)
    scores = [found["int4"] for found in score_windows(model, {"int4": plan}, windows)]
    expected, agree = [], []
    for row in windows.tokens:
        with torch.inference_mode():
            p = model(row.unsqueeze(0), use_cache=False).logits[0, :-1].double().softmax(-1)
            with two_view(model, plan):
                q = model(row.unsqueeze(0)).logits[0, :-1].double().softmax(-1)
        expected.append((p * (p / q).log()).sum(-1))
        agree.append(p.argmax(-1) == q.argmax(-1))
    expected, agree = torch.cat(expected), torch.cat(agree)
    found = divergence(scores)
    assert found.kl == pytest.approx(float(expected.mean()), rel=1e-4)
    assert found.kl_max == pytest.approx(float(expected.max()), rel=1e-4)
    assert found.top1 == pytest.approx(float(agree.double().mean()))
    assert 0 < found.kl < found.kl_p99 <= found.kl_max
    assert found.tokens == 64


def test_the_unquantized_recipe_does_not_diverge(tiny_model):
    model = tiny_model()
    plan = make_plan(load_recipe("fp16"), describe(model.config))
    windows = cut_windows(list(range(3, 53)), 50)
    found = divergence([found["fp16"] for found in score_windows(model, {"fp16": plan}, windows)])
    assert (found.kl, found.kl_max, found.top1) == (0, 0, 1)


def test_another_baseline_is_compared_from_its_own_weights(tiny_model):
    model, other = tiny_model(seed=0), tiny_model(seed=1)
    windows = cut_windows(list(range(3, 53)), 50)
    (found,) = score_windows(model, {"plain": None}, windows, baseline=other)
    (swapped,) = score_windows(other, {"plain": None}, windows, baseline=model)
    assert divergence([found["plain"]]).kl > 0.1
    assert torch.equal(found["plain"].losses, swapped["plain"].baseline_losses)


def test_the_99th_percentile_is_an_observed_token():
    kl = torch.arange(200.0)
    score = WindowScore(losses=kl, baseline_losses=kl, kl=kl, agrees=kl > 49)
    found = divergence([score])
    assert found.kl_p99 == 197
    assert found.kl_max == 199
    assert found.top1 == 0.75
    assert found.kl_stderr is None
