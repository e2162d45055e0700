"""Continuations of one context: sharing its computation changes nothing, and decoding through the cache agrees."""

from itertools import pairwise

import pytest
import torch
from transformers import Gemma2Config

from kvq.cache import make_plan
from kvq.errors import DataError, UnsupportedModelError
from kvq.eval import continuations
from kvq.eval.branches import Branches
from kvq.eval.continuations import Question, can_fork, rows_of, score_continuations
from kvq.eval.results_cache import Answers
from kvq.eval.two_view import two_view
from kvq.integrations import runtime
from kvq.models.describe import describe
from kvq.recipe import load_recipe

TOLERANCE = 1e-9
DIFFERENT = 1e-4
MODES = ("stream", "prefill", "chunked", "simulate")


def ids(count, seed):
    return tuple(torch.randint(3, 120, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


# 250 + 9 tokens cross kivi2's flush at 256, 3 tokens have hardly a past, 130 have just passed a flush.
QUESTIONS = [
    Question(context=ids(length, length), continuations=(ids(5, 1), ids(1, 2), ids(9, 3)))
    for length in (3, 60, 130, 250, 270)
]


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(dtype=torch.float64, head_dim=32)


def plan_of(model, name):
    if name == "before RoPE, rotated":
        recipe = load_recipe("kivi2").override(
            {"key.placement": "pre_rope", "transforms.value": [{"kind": "hadamard"}]}
        )
        return make_plan(recipe, describe(model.config))
    return make_plan(load_recipe(name), describe(model.config)) if name else None


def one_by_one(model, plan, questions, mode):
    """Every continuation in a row of its own."""
    return [
        [
            score_continuations(model, plan, [Question(context=q.context, continuations=(own,))], mode, chunk=50)[0][0]
            for own in q.continuations
        ]
        for q in questions
    ]


def gap(found, expected):
    pairs = [(a, b) for x, y in zip(found, expected) for a, b in zip(x, y)]
    return max(float((a.logprobs - b.logprobs).abs().max()) for a, b in pairs)


@pytest.mark.parametrize("name", [None, "fp16", "int4", "kivi2", "before RoPE, rotated"])
@pytest.mark.parametrize("mode", MODES)
def test_sharing_a_context_changes_nothing(model, name, mode):
    plan = plan_of(model, name)
    found = score_continuations(model, plan, QUESTIONS, mode, chunk=50, batch_size=3)
    expected = one_by_one(model, plan, QUESTIONS, mode)
    assert gap(found, expected) < TOLERANCE
    assert [s.packed for row in found for s in row] == [s.packed for row in expected for s in row]
    assert [s.greedy.tolist() for row in found for s in row] == [s.greedy.tolist() for row in expected for s in row]
    if name not in (None, "fp16"):
        assert gap(found, one_by_one(model, None, QUESTIONS, mode)) > DIFFERENT


def test_scales_that_would_span_two_continuations_are_not_shared(model):
    rows = rows_of(QUESTIONS, model, plan_of(model, "kivi2"), "stream", 50)
    assert [(row.index, row.first) for row in rows] == [(0, 0), (1, 0), (2, 0), (3, 0), (3, 1), (3, 2), (4, 0)]
    assert len(rows_of(QUESTIONS, model, plan_of(model, "int4"), "stream", 50)) == 5
    assert len(rows_of(QUESTIONS, model, plan_of(model, "kivi2"), "simulate", 50)) == 15


def test_neighbours_that_are_not_hidden_would_be_noticed(model, monkeypatch):
    plan = plan_of(model, "int4")
    expected = one_by_one(model, plan, QUESTIONS, "stream")
    monkeypatch.setattr(Branches, "hide", lambda *args: None)
    assert gap(score_continuations(model, plan, QUESTIONS, "stream"), expected) > DIFFERENT
    monkeypatch.undo()
    # Bounds by column instead of by position: a later branch would read tokens as stored too early.
    monkeypatch.setattr(Branches, "columns", lambda self, bounds: bounds.expand(len(self.contexts), -1))
    kivi = plan_of(model, "kivi2")
    expected = one_by_one(model, kivi, QUESTIONS, "stream")
    assert gap(score_continuations(model, kivi, QUESTIONS, "stream"), expected) > DIFFERENT


@torch.inference_mode()
def through_cache(model, plan, context, continuation, one_prompt):
    """Log-probabilities of decoding the continuation from a really packed cache."""
    tokens = torch.tensor([[*context, *continuation]])
    runtime.install(model, plan)
    try:
        cache, logits = runtime.new_cache(model), []
        cuts = [0, *range(len(context) if one_prompt else 1, tokens.shape[1])]
        for start, stop in pairwise(cuts):
            logits.append(model(tokens[:, start:stop], past_key_values=cache).logits[0])
    finally:
        runtime.uninstall(model)
    found = torch.cat(logits)[len(context) - 1 :].log_softmax(-1)
    targets = torch.tensor(continuation)
    return found.gather(1, targets.unsqueeze(1)).squeeze(1), found.argmax(-1) == targets


@pytest.mark.parametrize("name", ["kivi2", "int4", "before RoPE, rotated"])
@pytest.mark.parametrize("mode", ["stream", "prefill"])
def test_decoding_through_the_cache_agrees(model, name, mode):
    plan = plan_of(model, name)
    for question, found in zip(QUESTIONS[2:4], score_continuations(model, plan, QUESTIONS[2:4], mode, batch_size=2)):
        for own, scores in zip(question.continuations, found):
            logprobs, greedy = through_cache(model, plan, question.context, own, one_prompt=mode == "prefill")
            assert float((scores.logprobs - logprobs).abs().max()) < TOLERANCE
            assert torch.equal(scores.greedy, greedy)


def test_kept_scores_are_used_and_are_the_same_to_the_bit(model, tmp_path, monkeypatch):
    plan, seen = plan_of(model, "kivi2"), []
    settings = {"batch_size": 2, "answers": Answers(tmp_path, {"of": "kivi2"})}
    expected = score_continuations(model, plan, QUESTIONS, **settings)
    progress = lambda done, total: seen.append((done, total))  # noqa: E731
    monkeypatch.setattr(continuations, "hidden_states", None)
    found = score_continuations(model, plan, QUESTIONS, **settings, progress=progress)
    assert gap(found, expected) == 0
    assert [s.packed for row in found for s in row] == [s.packed for row in expected for s in row]
    assert seen[-1] == (15, 15)
    # A batch of which one score is missing is computed again, whole.
    other = Answers(None, {})
    other.put((name, settings["answers"].get([name])[0]) for q in QUESTIONS[:4] for name in continuations._names(q))
    with pytest.raises(TypeError, match="not callable"):
        score_continuations(model, plan, QUESTIONS, batch_size=2, answers=other)


def test_a_greedy_continuation_is_what_generate_writes(model):
    plan, context = plan_of(model, "int4"), ids(150, 9)
    runtime.install(model, plan)
    try:
        written = model.generate(torch.tensor([context]), max_new_tokens=12, do_sample=False, eos_token_id=None)
    finally:
        runtime.uninstall(model)
    own = tuple(written[0, 150:].tolist())
    wrong = (*own[:7], (own[7] + 1) % 120, *own[8:])
    question = Question(context=context, continuations=(own, wrong))
    right, other = score_continuations(model, plan, [question], "prefill")[0]
    assert right.is_greedy
    assert not other.is_greedy
    assert other.greedy[:7].all()
    assert not other.greedy[7]


def test_models_that_cannot_fork_get_a_row_each(tiny_model, model, monkeypatch):
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "head_dim": 16}
    sizes |= {"num_key_value_heads": 2, "num_hidden_layers": 2, "sliding_window": 8, "initializer_range": 0.3}
    gemma = tiny_model(Gemma2Config(**sizes), dtype=torch.float64)
    assert not can_fork(gemma)
    assert len(rows_of(QUESTIONS[:2], gemma, None, "stream", 50)) == 6
    with (
        pytest.raises(UnsupportedModelError, match="cannot fork"),
        two_view(gemma, None, branches=Branches.of([2], [[1]])),
    ):
        pass
    assert can_fork(model)
    assert can_fork(tiny_model())
    assert can_fork(tiny_model(dtype=torch.bfloat16))
    # A model that goes its own way with positions is found out by trying.
    other = tiny_model(seed=3)
    rotary = other.model.rotary_emb.forward
    other.model.rotary_emb.forward = lambda x, position_ids: rotary(x, torch.arange(x.shape[1]).unsqueeze(0))
    assert not can_fork(other)


def test_bad_questions_are_refused(model):
    for question in (
        Question(context=(), continuations=((3,),)),
        Question(context=(3,), continuations=()),
        Question(context=(3,), continuations=((4,), ())),
    ):
        with pytest.raises(DataError, match="not empty"):
            score_continuations(model, None, [question])
    branches = Branches.of([2], [[1, 2]])
    tokens = torch.tensor([[3, 4, 5, 6, 7]])
    with two_view(model, None, branches=branches), pytest.raises(DataError, match="position_ids"):
        model(tokens)
    mask = torch.tensor([[0, 1, 1, 1, 1]])
    with two_view(model, None, branches=branches), pytest.raises(DataError, match="attention_mask"):
        model(tokens, position_ids=branches.positions, attention_mask=mask)
    with pytest.raises(DataError, match="one token or more"):
        Branches.of([0], [[1]])


def test_broken_logits_are_named(tiny_model):
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    with pytest.raises(DataError, match="NaN or infinite"):
        score_continuations(model, None, [Question(context=(3, 4), continuations=((5,),))])
