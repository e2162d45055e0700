import math

import pytest
import torch

from kvq.cache import make_plan
from kvq.errors import DataError
from kvq.eval.likelihood import WindowScore, score_windows
from kvq.eval.perplexity import cut_windows, perplexity
from kvq.eval.two_view import two_view
from kvq.models.describe import describe
from kvq.recipe import load_recipe


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model()


def ids_of(count, seed=0):
    return torch.randint(3, 120, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def plan_of(model, name="int4"):
    return make_plan(load_recipe(name), describe(model.config))


def losses_by_hand(model, row, first, context=0):
    """Cross entropy of tokens [first, T) from the whole logits at once."""
    with torch.inference_mode():
        logits = model(row.unsqueeze(0), use_cache=False).logits[0]
    return torch.nn.functional.cross_entropy(logits[first - 1 : -1], row[first:], reduction="none")


def test_windows_without_overlap_score_all_but_their_first_token():
    windows = cut_windows(ids_of(103), 25)
    assert windows.tokens.shape == (4, 25)
    assert list(windows.first) == [1, 1, 1, 1]
    assert windows.scored == 96
    assert windows.context is None


def test_a_stride_scores_every_later_token_once():
    ids = list(range(1, 100))
    windows = cut_windows(ids, 20, stride=7)
    scored = [int(t) for row, first in zip(windows.tokens, windows.first) for t in row[first:]]
    assert scored == ids[1 : 1 + len(scored)]
    assert len(scored) == 19 + 7 * 11


def test_prefill_scores_the_second_half():
    windows = cut_windows(ids_of(60), 21, mode="prefill")
    assert windows.context == 10
    assert list(windows.first) == [10, 10]
    assert list(cut_windows(ids_of(60), 21, stride=5, mode="prefill").first)[1:] == [16] * 7


def test_perplexity_is_exp_of_the_mean_of_the_windows_mean_losses(model):
    windows = cut_windows(ids_of(150), 37)
    scores = [found["plain"] for found in score_windows(model, {"plain": None}, windows)]
    means = [losses_by_hand(model, row, 1).mean() for row in windows.tokens]
    found = perplexity(scores)
    assert found.value == pytest.approx(math.exp(sum(means) / len(means)), rel=1e-5)
    assert found.value == found.baseline
    assert found.delta_nll == found.delta_nll_stderr == 0
    assert found.tokens == 4 * 36


@pytest.mark.parametrize("mode", ["stream", "prefill", "chunked", "simulate"])
def test_losses_are_those_of_the_two_view_forward(model, mode):
    plan, windows = plan_of(model), cut_windows(ids_of(90), 41, mode=mode)
    settings = {"contexts": 20} if mode == "prefill" else {}
    for number, found in enumerate(score_windows(model, {"int4": plan}, windows, mode, batch_size=2, chunk=16)):
        row, first = windows.tokens[number], windows.first[number]
        with two_view(model, plan, mode, chunk=16, **settings):
            expected = losses_by_hand(model, row, first)
        assert torch.allclose(found["int4"].losses, expected, atol=1e-4)
        plain = losses_by_hand(model, row, first)
        assert torch.allclose(found["int4"].baseline_losses, plain, atol=1e-4)
        assert not torch.allclose(expected, plain, atol=1e-3)


def test_several_plans_share_a_baseline_and_blocks_change_nothing(model, monkeypatch):
    windows = cut_windows(ids_of(90), 30)
    plans = {name: plan_of(model, name) for name in ("int4", "int8")}
    together = list(score_windows(model, plans, windows))
    monkeypatch.setattr("kvq.eval.lm_head.BLOCK_NUMBERS", 7 * 128)
    for name, plan in plans.items():
        alone = list(score_windows(model, {name: plan}, windows))
        for one, other in zip(alone, together):
            assert torch.allclose(one[name].losses, other[name].losses, atol=1e-5)
            assert torch.allclose(one[name].kl, other[name].kl, atol=1e-5)
    assert not torch.allclose(together[0]["int4"].losses, together[0]["int8"].losses, atol=1e-3)


def test_the_head_applies_what_follows_the_decoder(tiny_model):
    """Gemma 2 caps its logits after the head."""
    from transformers import Gemma2Config

    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "head_dim": 16}
    config = Gemma2Config(**sizes, num_key_value_heads=2, num_hidden_layers=2, final_logit_softcapping=0.5)
    model, windows = tiny_model(config), cut_windows(ids_of(40), 40)
    (found,) = score_windows(model, {"plain": None}, windows)
    assert torch.allclose(found["plain"].losses, losses_by_hand(model, windows.tokens[0], 1), atol=1e-5)
    assert "forward" not in model.get_decoder().__dict__


def test_standard_error_is_over_windows():
    def score(*losses):
        own = torch.tensor(losses)
        rest = {"kl": own, "reverse_kl": own, "agrees": own > 0, "in_top5": own > 0}
        return WindowScore(losses=own, baseline_losses=torch.zeros(2), **rest)

    found = perplexity([score(1.0, 3.0), score(3.0, 5.0), score(2.0, 4.0)])
    assert found.delta_nll == pytest.approx(3.0)
    assert found.delta_nll_stderr == pytest.approx(1 / math.sqrt(3))
    assert found.verdict == "worse"
    assert found.low == pytest.approx(3 - 4.3027 / math.sqrt(3), abs=1e-3)
    assert perplexity([score(1.0, 3.0)]).delta_nll_stderr is None
    assert perplexity([score(1.0, 3.0)]).verdict == "too few samples to tell"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seq_len": 1}, "leaves no token"),
        ({"seq_len": 30, "stride": 31}, "use 1 to seq_len=30"),
        ({"seq_len": 30, "stride": 0}, "use 1 to seq_len=30"),
        ({"seq_len": 30, "limit": 0}, "leaves no window"),
        ({"seq_len": 64}, "has 50 tokens"),
    ],
)
def test_windows_that_cannot_be_cut_are_refused(settings, message):
    with pytest.raises(DataError, match=message):
        cut_windows(ids_of(50), **settings)


def test_logits_that_are_not_finite_are_named(tiny_model):
    model = tiny_model(seed=3)
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(DataError, match="window 0"):
        list(score_windows(model, {"plain": None}, cut_windows(ids_of(30), 30)))
