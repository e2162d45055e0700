"""kvq's own tasks: what they hide is there, what they ask has one answer, and every model is asked the same."""

import random
from itertools import pairwise

import pytest
import torch

from kvq.cache import make_plan
from kvq.errors import DataError
from kvq.eval.continuations import TokenScores, rows_of
from kvq.eval.greedy import greedy_continuations
from kvq.eval.probes import PROBES
from kvq.eval.probes.base import Ask, Outcome, Passage, Setting, outcomes
from kvq.eval.probes.copies import split
from kvq.eval.probing import ask, pair
from kvq.eval.results_cache import Answers
from kvq.models.describe import describe
from kvq.recipe import load_recipe

TEXT = "Plain words stand here one after the other, and nothing is hidden among them. " * 40
QUESTIONS = tuple(name for name in PROBES if name != "drift")


def setting(tokenizer, *, seed=0, count=2, lengths=(1400,), longest=4096, generate=None):
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    return Setting(
        encode=encode,
        filler=encode(TEXT),
        lengths=lengths,
        count=count,
        seed=seed,
        longest=longest,
        generate=generate or (lambda prompts, tokens: [tuple(range(5, 5 + tokens)) for _ in prompts]),
    )


def text_of(tokenizer, tokens):
    return tokenizer.decode(list(tokens))


@pytest.mark.parametrize("name", sorted(PROBES))
def test_passages_are_repeatable_and_depend_on_the_seed(tiny_tokenizer, name):
    build = PROBES[name].build
    passages = build(setting(tiny_tokenizer))
    assert passages == build(setting(tiny_tokenizer))
    assert len(passages) == 2
    assert passages[0] != passages[1]
    assert passages != build(setting(tiny_tokenizer, seed=1))
    # More passages do not change the first ones.
    assert build(setting(tiny_tokenizer, count=3))[:2] == passages
    assert PROBES[name].name == name


@pytest.mark.parametrize("name", QUESTIONS)
@pytest.mark.parametrize("length", [1400, 2048])
def test_passages_keep_their_length_and_leave_room_to_answer(tiny_tokenizer, name, length):
    for passage in PROBES[name].build(setting(tiny_tokenizer, lengths=(length,), longest=2048)):
        longest = max(len(own) for own in passage.question.continuations)
        assert length - 300 < len(passage.tokens) <= length + 8
        assert len(passage.tokens) + longest <= 2048
        assert all(one.labels["length"] == length for one in passage.asks)


@pytest.mark.parametrize("name", ["needle", "multi_key", "variable_tracking"])
def test_the_right_answer_stands_in_the_passage_once_asked_for(tiny_tokenizer, name):
    for passage in PROBES[name].build(setting(tiny_tokenizer)):
        text = text_of(tiny_tokenizer, passage.tokens)
        for one in passage.asks:
            candidates = [text_of(tiny_tokenizer, own).strip() for own in one.candidates]
            assert len(set(candidates)) == len(candidates)
            assert all(candidate in text for candidate in candidates)
            assert text_of(tiny_tokenizer, one.candidates[one.right]).startswith(" ")


def test_needles_lie_at_their_depths(tiny_tokenizer):
    for passage in PROBES["needle"].build(setting(tiny_tokenizer, lengths=(3000,))):
        text = text_of(tiny_tokenizer, passage.tokens)
        places = []
        for one in passage.asks:
            city = text_of(tiny_tokenizer, one.prompt).rsplit(" of ", 1)[1].removesuffix(" is")
            key = text_of(tiny_tokenizer, one.candidates[one.right]).strip()
            assert text.count(f"The pass key of {city} is {key}. Remember it: {key} is the pass key of {city}.") == 1
            places.append(text.index(f"The pass key of {city}") / len(text))
        assert [round(4 * place) / 4 for place in places] == [one.labels["depth"] for one in passage.asks]
        assert [one.labels["depth"] for one in passage.asks] == [0, 0.25, 0.5, 0.75, 1]


def test_default_lengths_double_up_to_what_the_model_takes():
    lengths = PROBES["needle"].lengths
    assert lengths(8192) == (1024, 2048, 4096, 8192)
    assert lengths(131072) == (1024, 2048, 4096, 8192)
    assert lengths(2048) == (1024, 2048)
    assert lengths(600) == (600,)


def test_names_follow_their_chain(tiny_tokenizer):
    for passage in PROBES["variable_tracking"].build(setting(tiny_tokenizer)):
        text, given = text_of(tiny_tokenizer, passage.tokens), {}
        lines = [line.split(" = ") for line in text.split("\n") if " = " in line]
        for own, value in lines:
            # A name is given before it is used.
            given[own] = given.get(value, value)
        assert len(lines) == 8
        for one in passage.asks:
            own = text_of(tiny_tokenizer, one.prompt).strip().removesuffix(" =")
            assert given[own] == text_of(tiny_tokenizer, one.candidates[one.right]).strip()
            direct = dict(lines)[own].isdigit()
            assert one.labels["hops"] == (1 if direct else 2)


@pytest.mark.parametrize("name", ["copy_json", "copy_code"])
def test_copies_are_token_for_token_what_the_passage_holds(tiny_tokenizer, name):
    for passage in PROBES[name].build(setting(tiny_tokenizer)):
        windows = {}
        for one in passage.asks:
            record = one.prompt[2:] + one.candidates[0]
            places = [i for i in range(len(passage.tokens)) if passage.tokens[i : i + len(record)] == record]
            assert len(places) == 1
            windows[places[0]] = len(record)
            assert len(one.candidates) == 1
            # What is repeated tells the record apart.
            begin = one.prompt[2:]
            assert sum(passage.tokens[i : i + len(begin)] == begin for i in range(len(passage.tokens))) == 1
        assert len(windows) == 4


def test_records_are_cut_between_tokens():
    # A tokenizer that knows "(a" as one token must not get "(" and "a".
    table = {"def f(": [1, 2, 3], "def f(a): x": [1, 2, 9, 4]}
    assert split("def f(", "def f(a): x", table.__getitem__) == ((1, 2), (9, 4))


def test_many_keys_are_all_different(tiny_tokenizer):
    passage = PROBES["multi_key"].build(setting(tiny_tokenizer))[0]
    lines = [line for line in text_of(tiny_tokenizer, passage.tokens).split("\n") if ": " in line][1:]
    keys = [line.split(": ")[0] for line in lines]
    assert len(set(keys)) == len(keys) > 40
    depths = [one.labels["depth"] for one in passage.asks]
    assert depths[0] == 0
    assert depths[-1] == 1
    assert all(a < b for a, b in pairwise(depths))


def test_too_short_passages_are_refused(tiny_tokenizer):
    with pytest.raises(DataError, match="use longer --lengths"):
        PROBES["copy_json"].build(setting(tiny_tokenizer, lengths=(200,)))
    with pytest.raises(DataError, match="fewer than two tokens"):
        Setting(encode=list, filler=[1], lengths=None, count=None, seed=0, longest=100, generate=lambda *args: []).cut(
            random.Random(0), 5
        )


def test_usual_recipes_share_the_forward_of_a_passage(tiny_model, tiny_tokenizer):
    model = tiny_model(head_dim=32)
    passages = PROBES["needle"].build(setting(tiny_tokenizer, lengths=(1024,)))
    questions = [passage.question for passage in passages]
    for name in ("kivi2", "int4"):
        plan = make_plan(load_recipe(name), describe(model.config))
        assert len(rows_of(questions, model, plan, "stream", 512)) == len(questions)


def scores(logprobs, greedy, packed=1):
    return TokenScores(logprobs=torch.tensor(logprobs), greedy=torch.tensor(greedy), packed=packed)


def test_outcomes_follow_from_the_scores():
    one = Ask(prompt=(7,), candidates=((1, 2), (3, 4)), right=1, labels={"depth": 0})
    two = Ask(prompt=(), candidates=((5, 6, 8),), right=0, labels={"depth": 1})
    passage = Passage(tokens=(1, 2, 3), asks=(one, two))
    assert passage.question.continuations == ((7, 1, 2), (7, 3, 4), (5, 6, 8))
    found = outcomes(
        passage,
        [
            # The prompt's token counts for nothing.
            scores([-9.0, -1.0, -2.0], [False, True, True]),
            scores([-1.0, -1.0, -1.5], [True, True, False]),
            scores([-1.0, -0.5, -0.25], [True, True, True], packed=2),
        ],
    )
    assert (found[0].choice, found[0].exact, found[0].copied, found[0].tokens) == (True, False, 0.5, 1)
    assert (found[0].nll, found[0].agreement, found[0].scored) == (1.25, 0.5, 2)
    assert (found[1].choice, found[1].exact, found[1].copied, found[1].packed) == (None, True, 1.0, 2)
    worse = outcomes(passage, [scores([-9.0, -1.0, -1.0], [False] * 3)] + [scores([-1.0, -1.0, -1.5], [True] * 3)] * 2)
    assert worse[0].choice is False


def run(name, model, plan, tokenizer, mode="stream", **settings):
    passages = PROBES[name].build(setting(tokenizer, **settings))
    return [ask(model, own, passages, Answers(None, {}), mode=mode, chunk=512) for own in (plan, None)]


def test_a_recipe_is_paired_with_its_baseline(tiny_model, tiny_tokenizer):
    model = tiny_model(head_dim=32)
    plan = make_plan(load_recipe("kivi2"), describe(model.config))
    found, base = run("needle", model, plan, tiny_tokenizer, lengths=(600, 800), count=2)
    result = pair(PROBES["needle"], found, base, mode="stream", quantizes=True, data={})
    assert result.samples == 20
    assert 0 < result.packed_share <= 1
    assert result.chance == 0.2
    metric = result.metrics["nll"]
    values, other = ([o.nll for row in rows for o in row] for rows in (found, base))
    assert metric.difference == pytest.approx(sum(values) / 20 - sum(other) / 20)
    assert metric.difference != 0
    # Errors are over the four passages, not over the twenty questions.
    assert metric.units == 4
    assert {(cell.labels["length"], cell.labels["depth"]) for cell in result.cells} == {
        (length, depth) for length in (600, 800) for depth in (0, 0.25, 0.5, 0.75, 1)
    }
    assert sum(cell.questions for cell in result.cells) == 20
    same = pair(PROBES["needle"], base, base, mode="stream", quantizes=False, data={})
    assert {metric.verdict for metric in same.metrics.values()} == {"same"}
    # A random model finds needles by luck.
    assert same.weak


def outcome(choice):
    return Outcome(
        labels={"length": 1, "depth": 0}, choice=choice, exact=choice, copied=1.0, tokens=1, agreement=1.0, nll=1.0,
        packed=1, scored=1,
    )  # fmt: skip


def test_answers_that_change_in_both_directions_are_not_the_same():
    """Within every passage one answer is lost and one won: the means agree to the bit, and prove nothing."""
    base = [[outcome(True), outcome(False), outcome(True)] for _ in range(4)]
    found = [[outcome(False), outcome(True), outcome(True)] for _ in range(4)]
    metric = pair(PROBES["needle"], found, base, mode="stream", quantizes=True, data={}).metrics["choice"]
    assert (metric.difference, metric.lost, metric.won, metric.flip_rate) == (0, 4, 4, pytest.approx(2 / 3))
    assert metric.verdict == "too few samples to tell"
    assert metric.low < -0.2
    assert metric.high > 0.2


def test_answers_that_read_nothing_quantized_get_no_number(tiny_model, tiny_tokenizer):
    model = tiny_model(head_dim=32)
    plan = make_plan(load_recipe("kivi2").override({"tokens.window": 2048}), describe(model.config))
    found, base = run("needle", model, plan, tiny_tokenizer, lengths=(600,), count=1)
    result = pair(PROBES["needle"], found, base, mode="stream", quantizes=True, data={})
    assert result.metrics == {}
    assert "--lengths" in result.refused


@pytest.mark.long
def test_drift_counts_the_tokens_of_the_recipes_own_greedy_text(tiny_model, tiny_tokenizer):
    """By really generating through the packed cache, token by token."""
    from kvq.integrations import runtime

    model = tiny_model(head_dim=32, dtype=torch.float64)
    plan = make_plan(load_recipe("int4"), describe(model.config))
    kept = Answers(None, {})
    generate = lambda prompts, tokens: greedy_continuations(  # noqa: E731
        model, prompts, tokens, batch_size=2, answers=kept
    )
    passages = PROBES["drift"].build(setting(tiny_tokenizer, lengths=(40,), count=3, longest=80, generate=generate))
    assert all(len(one.candidates[0]) == 40 for passage in passages for one in passage.asks)
    found = ask(model, plan, passages, Answers(None, {}), mode="prefill", chunk=512)
    base = ask(model, None, passages, Answers(None, {}), mode="prefill", chunk=512)
    assert [row[0].tokens for row in base] == [40, 40, 40]
    for passage, (outcome,) in zip(passages, found):
        runtime.install(model, plan)
        try:
            written = model.generate(
                torch.tensor([passage.tokens]), max_new_tokens=40, do_sample=False, eos_token_id=None
            )[0, len(passage.tokens) :].tolist()
        finally:
            runtime.uninstall(model)
        expected = list(passage.asks[0].candidates[0])
        left = next((i for i, (a, b) in enumerate(zip(written, expected)) if a != b), 40)
        assert outcome.tokens == left
    assert min(row[0].tokens for row in found) < 40
    result = pair(PROBES["drift"], found, base, mode="prefill", quantizes=True, data={})
    assert result.metrics["tokens"].baseline == 40
    assert 0 < result.metrics["agreement"].value < 1
