import pytest
import torch

from kvq.cache import make_plan
from kvq.eval.divergence import divergence
from kvq.eval.likelihood import WindowScore, score_windows
from kvq.eval.perplexity import cut_windows
from kvq.eval.two_view import two_view
from kvq.models.describe import describe
from kvq.recipe import load_recipe


def test_kl_and_top1_equal_the_definition(tiny_model):
    model = tiny_model()
    plan = make_plan(load_recipe("int4"), describe(model.config))
    ids = torch.randint(3, 120, (77,), generator=torch.Generator().manual_seed(0)).tolist()
    windows = cut_windows(ids, 33)
    scores = [found["int4"] for found in score_windows(model, {"int4": plan}, windows)]
    expected, reverse, agree, five = [], [], [], []
    for row in windows.tokens:
        with torch.inference_mode():
            p = model(row.unsqueeze(0), use_cache=False).logits[0, :-1].double().softmax(-1)
            with two_view(model, plan):
                q = model(row.unsqueeze(0)).logits[0, :-1].double().softmax(-1)
        expected.append((p * (p / q).log()).sum(-1))
        reverse.append((q * (q / p).log()).sum(-1))
        agree.append(p.argmax(-1) == q.argmax(-1))
        five.append(((q > q.gather(1, p.argmax(-1, keepdim=True))).sum(-1)) < 5)
    expected, reverse, agree, five = (torch.cat(column) for column in (expected, reverse, agree, five))
    found = divergence(scores)
    assert found.reverse_kl == pytest.approx(float(reverse.mean()), rel=1e-4)
    assert found.reverse_kl != pytest.approx(found.kl, rel=1e-4)
    assert found.top5 == pytest.approx(float(five.double().mean()))
    assert found.top1 < found.top5 <= 1
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


def score_of(kl):
    return WindowScore(losses=kl, baseline_losses=kl, kl=kl, reverse_kl=2 * kl, agrees=kl > 49, in_top5=kl > 9)


def test_the_99th_percentile_is_an_observed_token():
    found = divergence([score_of(torch.arange(200.0))])
    assert found.kl_p99 == 197
    assert found.kl_max == 199
    assert (found.top1, found.top5) == (0.75, 0.95)
    assert found.reverse_kl == 2 * found.kl
    assert found.kl_stderr is None


def test_positions_and_the_worst_token():
    windows = cut_windows(list(range(300)), 150)
    first, second = torch.zeros(149), torch.zeros(149)
    # Token 1 of the first window, token 70 of both, and the last.
    first[0], first[69], second[69], second[148] = 8.0, 63.0, 1.0, 100.0
    reads = torch.arange(150) >= 99
    found = divergence([score_of(first), score_of(second)], windows, reads, decode=lambda ids: ",".join(map(str, ids)))
    rows = [(row.first, row.last, row.tokens, row.cached) for row in found.positions]
    # The token at 100 is predicted by the query at 99.
    assert rows == [(1, 63, 126, 0.0), (64, 127, 128, 28 / 64), (128, 149, 44, 1.0)]
    assert [row.kl for row in found.positions] == [8 / 126, 64 / 128, 100 / 44]
    assert found.positions[1].kl_stderr == pytest.approx(0.5 * (63 - 1) / 64)
    assert (found.worst.window, found.worst.position, found.worst.kl) == (1, 149, 100)
    assert found.worst.token == "299"
    assert found.worst.before == ",".join(map(str, range(287, 299)))
    assert divergence([score_of(first)]).worst is None
    assert divergence([score_of(first)]).positions == ()


def test_positions_of_strided_windows_begin_where_scoring_does():
    windows = cut_windows(list(range(300)), 200, stride=50)
    scores = [score_of(torch.ones(200 - start)) for start in windows.first]
    found = divergence(scores, windows, torch.ones(200, dtype=torch.bool), decode=str)
    assert sum(row.tokens for row in found.positions) == windows.scored == 199 + 50 + 50
    assert found.positions[-1].tokens == 72 + 50 + 50
