"""Searches of tiny models from end to end: budgets, floors, limits, resuming, and what is found."""

import itertools
import json
import string
from dataclasses import replace

import pytest
import torch
from transformers import Gemma3TextConfig

from kvq.calib.artefacts import needed_artefacts
from kvq.calib.collect import collect
from kvq.calib.needs import ALL_NEEDS
from kvq.errors import DataError
from kvq.eval.evaluate import evaluate
from kvq.eval.evaluated_model import load_evaluated
from kvq.eval.likelihood import Windows, score_windows
from kvq.models.describe import describe
from kvq.models.resolve import load_model, weights_fingerprint
from kvq.report.drawing import png
from kvq.report.pareto import pareto_figure, pareto_page
from kvq.searching.outcome import Settings
from kvq.searching.search import search
from kvq.searching.search_evidence import evidence, front_rows, recipe_text
from kvq.searching.sensitivity import Sensitivity
from kvq.searching.verify import Verifier

SMALL = {"seq_len": 96, "windows": 2, "verify_windows": 2, "anchors": 3}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    generator = torch.Generator().manual_seed(3)
    letters = string.ascii_letters + "     "
    picks = torch.randint(len(letters), (3000,), generator=generator)
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(letters[i] for i in picks))
    return file


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_model, tiny_tokenizer):
    """(folder, statistics) of a tiny Llama."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model(layers=3, heads=4, kv_heads=2, head_dim=32).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    windows = torch.randint(3, 100, (4, 96), generator=torch.Generator().manual_seed(1))
    return folder, collect(
        load_model(folder), windows, needs=ALL_NEEDS, weights_fingerprint=weights_fingerprint(folder)
    )


def run(made, text, space_data, budgets=(3.0,), **settings):
    folder, stats = made
    own = {name: settings.pop(name) for name in ("journal", "progress") if name in settings}
    texts = {"data": (text,)} | {name: settings.pop(name) for name in ("data", "verify_data") if name in settings}
    return search(folder, Settings(budgets=budgets, **SMALL | settings), stats=stats, space=space_data, **texts, **own)


@pytest.fixture(scope="module")
def found(made, text, space_data):
    return run(made, text, space_data, budgets=(3.0, 5.0))


def test_budgets_hold_in_stored_bytes(found):
    for point in found.points:
        assert 2 < point.chosen.bits <= point.budget
        assert point.filled_bits > point.chosen.bits


def test_mixed_precision_beats_the_best_uniform_recipe(found):
    """On text that chose nothing."""
    for point in found.points:
        assert point.chosen.how != "uniform"
        assert point.confirmed.kl < point.uniform_confirmed.kl
    assert found.points[1].confirmed.kl < found.points[0].confirmed.kl


def test_the_evidence_measures_the_same_again(found, made, text, tmp_path):
    """The recipe file is an ordinary recipe: ``evaluate`` of the confirming windows gives the confirmed KL."""
    folder, stats = made
    point = found.points[0]
    proof = json.loads(json.dumps(evidence(found, point, ["kvq", "search"])))
    file = tmp_path / "mine.yaml"
    file.write_text(recipe_text(point.chosen.recipe, point, "mine.evidence.json"))
    result = evaluate(folder, file, stats=stats, data=text, seq_len=96, tasks=("divergence",))
    assert result.recipe_hash == proof["recipe_hash"]
    assert result.asymptotic_bits == pytest.approx(proof["bits"])
    evaluated = load_evaluated(folder, file, stats=stats)
    ids = evaluated.tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
    (dealt,) = (row["windows"] for row in proof["text"]["search"])
    means = []
    for half in ("first half", "second half"):
        windows = torch.tensor([ids[96 * n : 96 * n + 96] for n in dealt[half]])
        found_again = score_windows(evaluated.model, {"it": evaluated.plan}, Windows(tokens=windows, first=[1, 1]))
        means.append(float(torch.stack([score["it"].kl.double().mean() for score in found_again]).mean()))
        assert means[-1] == pytest.approx(proof["held_out"][f"{half} of {text.name}"]["found"]["kl"], rel=1e-5)
    assert sum(means) / 2 == pytest.approx(proof["confirmed"]["kl"], rel=1e-5)


def test_what_is_fitted_is_confirmed_with_transforms_fitted_to_another_text(found, made):
    """The windows that chose give the other statistics; the same recipe then stores other numbers."""
    folder, _ = made
    point = found.points[0]
    fitted = needed_artefacts(point.chosen.recipe, describe(load_model(folder).config))
    assert fitted
    for text in point.held_out.values():
        assert text.found_refitted.kl != text.found.kl
        assert text.found_refitted.kl == pytest.approx(text.found.kl, rel=0.5)
        assert text.is_led("kl")


def test_a_recipe_that_does_not_lead_on_every_held_out_text_gives_way_to_the_uniform_one(
    made, text, space_data, found, monkeypatch
):
    """One text where one recipe for all layers is better, by a lie about that text alone, decides for that recipe."""
    measure = Verifier.measure

    def lie(self, part, *rest):
        rows = measure(self, part, *rest)
        if not part.startswith("confirming second half"):
            return rows
        best = found.points[0].uniform.recipe.hash
        return {name: replace(row, kl=0.0) if name == best else row for name, row in rows.items()}

    monkeypatch.setattr(Verifier, "measure", lie)
    (point,) = run(made, text, space_data).points
    assert point.chosen.how == "uniform"
    assert point.chosen.recipe.name == "auto-3"
    assert point.lost.recipe.hash == found.points[0].chosen.recipe.hash
    assert point.confirmed == point.uniform_confirmed
    proof = evidence(found, point, [])
    assert proof["lost"]["recipe_hash"] == point.lost.recipe.hash
    assert "One way for all layers won" in recipe_text(point.chosen.recipe, point, "e.json")


def test_several_texts_measure_choose_and_confirm(made, text, space_data, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[::-1])
    both = run(made, text, space_data, data=(text, other), verify_windows=1, windows=1)
    assert both.facts["windows_used"] == 2
    assert list(both.points[0].held_out) == ["text.txt", "other.txt"]
    one = run(made, text, space_data, data=(text,), verify_data=(other,), verify_windows=1, windows=1)
    assert list(one.points[0].held_out) == ["text.txt", "other.txt"]
    assert set(one.facts["text"]["search"][0]["windows"]) == {"choosing", "confirming", "measuring"}
    with pytest.raises(DataError, match=r"'text.txt' is named twice"):
        run(made, text, space_data, data=(text,), verify_data=(text,))


def test_windows_stand_at_positions_up_to_the_context(made, text, space_data, found):
    """Keys that are stored after RoPE in a basis of the first positions lose more further on; what RoPE makes of one
    distance is the same, so the exact model does not change."""
    far = run(made, text, space_data, context=512, budgets=(3.0, 5.0))
    assert far.facts["settings"]["context"] == 512
    ours, theirs = ({(e.layer, e.side, e.option): e.damage for e in f.table if e.measured} for f in (found, far))
    shared = [key for key in ours if key in theirs]
    assert any(ours[key] != theirs[key] for key in shared if key[1] == "key")
    with pytest.raises(DataError, match="context=64 is less than a window"):
        run(made, text, space_data, context=64)
    with pytest.raises(DataError, match="is more than the"):
        run(made, text, space_data, context=1 << 30)


def test_predictions_are_never_given_as_measured(found):
    proof = evidence(found, found.points[0], [])
    for row in proof["chosen_from"]:
        assert row["measured"]["kl"] != row["predicted"]
    interpolated = [entry for entry in found.table if not entry.measured]
    assert interpolated
    rows = proof["table"]
    for entry in found.table:
        assert rows[f"{entry.side} {entry.layer}"][entry.option][2] is entry.measured


def test_what_is_chosen_was_measured(found):
    """Refinement measures what an allocation chose by interpolation, and allocates again."""
    for point in found.points:
        assert all(choice.entry.measured for choice in point.chosen.allocation.choices)
        assert evidence(found, point, [])["solver"]["interpolated_choices"] == 0


def test_the_parts_of_the_text_share_no_window(found):
    (dealt,) = (row["windows"] for row in found.facts["text"]["search"])
    assert {part: len(windows) for part, windows in dealt.items()} == {
        "choosing": 2, "first half": 2, "second half": 2, "measuring": 2,
    }  # fmt: skip
    assert len({number for windows in dealt.values() for number in windows}) == 8
    assert max(dealt["first half"]) < min(dealt["second half"])


def test_killed_anywhere_it_goes_on_to_the_same_answer(made, text, space_data, found, tmp_path, monkeypatch):
    journal = tmp_path / "j.jsonl"
    for jobs in (0, 4, 8, 11, 15):
        count = 0

        def progress(stage, done, total, jobs=jobs):
            nonlocal count
            count += 1
            if count > jobs:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(made, text, space_data, budgets=(3.0, 5.0), journal=journal, progress=progress)
    again = run(made, text, space_data, budgets=(3.0, 5.0), journal=journal)
    for one, other in zip(found.points, again.points):
        assert one.chosen.recipe.hash == other.chosen.recipe.hash
        assert one.confirmed == other.confirmed
    # Another budget needs neither the scan nor the anchors again.
    monkeypatch.setattr(Sensitivity, "_scan", None)
    monkeypatch.setattr(Sensitivity, "_measure", None)
    last = run(made, text, space_data, budgets=(4.0,), journal=journal)
    assert last.points[0].budget == 4.0


def test_a_floor_that_cannot_be_kept_is_refused_with_the_best(made, text, space_data):
    with pytest.raises(
        DataError, match=r"no recipe of at most 3 bits keeps top1=0.9999 on unseen text \(the best has 0"
    ):
        run(made, text, space_data, floors={"top1": 0.9999})


def test_a_floor_that_is_kept_is_no_obstacle(made, text, space_data):
    assert run(made, text, space_data, floors={"top1": 0.1, "kl": 5.0}).points[0].confirmed.top1 > 0.1


def test_a_time_limit_that_does_not_suffice_says_so(made, text, space_data):
    with pytest.raises(DataError, match=r"the time limit ended the search after .* allow more time"):
        run(made, text, space_data, time_limit=1e-6)


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass with every look at the clock, so that a limit cuts a search at any decision."""
    looks = itertools.count()
    monkeypatch.setattr("kvq.searching.deadline.monotonic", lambda: float(next(looks)))
    return looks


def test_a_time_limit_bounds_the_whole_run_and_gives_what_was_found(made, text, space_data, found, tmp_path, clock):
    """Wherever the limit falls, once every option was tried there is a recipe that was measured on other text."""
    used = set()
    for limit in (9, 10, 14, 20, 30, 40):
        journal = tmp_path / f"{limit}.sqlite"
        start = next(clock)
        late = run(made, text, space_data, budgets=(3.0, 5.0), time_limit=limit, journal=journal)
        # At most the looks that decide nothing any more: a few a part, for what is measured of it at any rate.
        parts = 1 + len(late.points[0].held_out)
        assert next(clock) - start <= limit + 4 * parts
        assert not late.complete
        assert late.left_out
        for point in late.points:
            assert point.chosen.bits <= point.budget
            assert point.confirmed.tokens >= 95
            assert point.chosen.measured.windows >= 1
        used.add(late.facts["windows_used"])
        front_rows(late), [evidence(late, point, []) for point in late.points]
    assert {0, 1} <= used
    # What was found is kept: the same call without a limit goes on to the answer of an undisturbed search.
    for one, other in zip(found.points, run(made, text, space_data, budgets=(3.0, 5.0), journal=journal).points):
        assert one.chosen.recipe.hash == other.chosen.recipe.hash
        assert one.confirmed == other.confirmed


def test_layers_without_a_measurement_are_foreseen_and_said_so(made, text, space_data, clock):
    """Cut after one layer of three: the others take its ratios of damage to error, and nothing is called measured."""
    late = run(made, text, space_data, time_limit=10)
    measured = {entry.layer for entry in late.table if entry.measured}
    assert measured == {0}
    assert "measuring of layers 1-2, which is foreseen from others" in late.left_out
    assert all(entry.damage > 0 for entry in late.table)


def test_a_limit_that_is_long_enough_changes_nothing(made, text, space_data, found):
    again = run(made, text, space_data, budgets=(3.0, 5.0), time_limit=1e6)
    assert again.complete
    assert [p.confirmed for p in again.points] == [p.confirmed for p in found.points]


def test_exact_tokens_count_where_bits_are_of_a_filled_cache(made, text, space_data):
    """With so few tokens a window of 32 is dear, so some layers do without."""
    found = run(made, text, space_data, budgets=(9.0,), tokens=256, windows=1)
    point = found.points[0]
    assert point.chosen.bits <= 9.0
    assert {entry.policy for entry in found.table} == {0, 1}
    assert not any(name.startswith("tokens") for name in found.left_out)


def test_few_full_attention_layers_are_found_unaided(tmp_path, tiny_model, tiny_tokenizer, text, space_data):
    config = Gemma3TextConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        sliding_window=32,
        layer_types=["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
        initializer_range=0.15,
        pad_token_id=2,
    )
    folder = tmp_path / "gemma"
    tiny_model(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    plain = space_data | {"key": space_data["key"][1:]}
    found = search(folder, Settings(budgets=(4.5,), **SMALL), data=(text,), space=plain)
    assert {entry.layer for entry in found.table} == {3}
    assert found.points[0].chosen.bits <= 4.5
    assert describe(config).full_layers[0].index == 3


def test_a_layer_that_matters_most_gets_the_bits(tmp_path, made, text, space_data, tiny_model, tiny_tokenizer):
    """Values of layer 0 that the model reads eight times as loudly."""
    model = tiny_model(layers=3, heads=4, kv_heads=2, head_dim=32)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.mul_(8)
    folder = tmp_path / "loud"
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    plain = space_data | {"key": space_data["key"][1:]}
    found = search(folder, Settings(budgets=(4.0,), heads=False, **SMALL), data=(text,), space=plain)
    bits = {(c.entry.side, c.entry.layer): c.entry.bits for c in found.points[0].chosen.allocation.choices}
    assert bits["value", 0] == max(bits[side, i] for side, i in bits if side == "value")
    assert bits["value", 0] > min(bits["value", 1], bits["value", 2])


def test_pictures_show_measured_and_predicted_apart(found):
    data = json.loads(json.dumps(front_rows(found)))
    figure = pareto_figure(data)
    assert png(figure).startswith(b"\x89PNG")
    page = pareto_page(data, figure)
    for point in data["points"]:
        assert f"{point['measured']['kl']:.5f}" in page
    assert "http" not in page
    assert {row["layer"] for row in data["layers"]["key"]} == {0, 1, 2}
