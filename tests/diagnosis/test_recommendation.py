"""Laws: the verdict names recipes that would ruin the model, and the one of fewest bits that would not."""

import math

import pytest

from kvq.diagnosis import Diagnosis, Prediction, bit_errors, diagnose, layers_of, predict
from kvq.diagnosis.predict import COLLAPSE, GOOD, predicted_loss
from kvq.errors import RecipeError
from kvq.recipe import load_recipe


def recipes(*names):
    return [load_recipe(name) for name in names]


def test_a_large_key_bias_ruins_keys_per_token_and_not_per_channel(biased, measured):
    found = {}
    for size in (0.0, 300.0):
        diagnosis = diagnose(measured(biased(size)), recipes("int4", "kivi4", "int8"))
        found[size] = {p.recipe: p for p in diagnosis.predictions}
        if size:
            assert "int4" in diagnosis.collapses
            assert "kivi4" not in diagnosis.collapses
            assert "int4 would ruin this model" in diagnosis.sentence()
    assert found[0.0]["int4"].verdict != "collapse"
    assert found[300.0]["int4"].loss > 3 * found[0.0]["int4"].loss
    assert found[300.0]["kivi4"].loss < 2 * found[0.0]["kivi4"].loss


def test_the_recommended_recipe_is_the_good_one_of_fewest_bits(tiny_model, measured):
    diagnosis = diagnose(measured(tiny_model(layers=3, head_dim=32)), recipes("int8", "fp8", "kivi2", "fp16"))
    good = [p for p in diagnosis.predictions if p.loss <= GOOD]
    assert len(good) >= 2
    assert diagnosis.recommended.bits == min(p.bits for p in good)
    assert f"Use {diagnosis.recommended.recipe}:" in diagnosis.sentence()
    assert [p.bits for p in diagnosis.predictions] == sorted((p.bits for p in diagnosis.predictions), reverse=True)


def test_where_nothing_is_good_it_says_so(tiny_model, measured):
    diagnosis = diagnose(measured(tiny_model(layers=3, head_dim=32)), recipes("kivi2"))
    assert diagnosis.recommended is None
    assert "keep fp16" in diagnosis.sentence()


def test_a_recipe_that_lacks_statistics_says_which(tiny_model, measured):
    stats = measured(tiny_model(layers=2, head_dim=64))
    (found,) = diagnose(stats, recipes("klt3")).predictions
    assert found.verdict == "unknown"
    assert "--full" in found.why_not
    assert math.isnan(found.loss)
    full = measured(tiny_model(layers=2, head_dim=64), full=True)
    (found,) = diagnose(full, recipes("klt3")).predictions
    assert found.loss > 0


def test_moments_alone_predict_a_recipe_that_reads_them(tiny_model, measured):
    """Tokens are then drawn by them."""
    from kvq.calib.needs import needs_of
    from kvq.models.describe import describe

    model = tiny_model(layers=2, head_dim=64)
    recipe = load_recipe("klt4")
    alone = measured(model, needs=needs_of(recipe, describe(model.config)) | {"value.range"})
    found = [predict(recipe, stats, layers_of(stats)).loss for stats in (alone, measured(model, full=True))]
    assert 0.3 < found[0] / found[1] < 3


def test_loss_grows_with_errors_and_with_few_layers():
    few, many, more = (dict.fromkeys(range(n), 0.1) for n in (2, 8, 20))
    assert predicted_loss(few) == pytest.approx(2 * predicted_loss(many))
    assert predicted_loss(many) == pytest.approx(predicted_loss(more))
    assert predicted_loss({0: 0.2, 1: 0.2}) > predicted_loss(few)
    assert predicted_loss({0: 0.0, 1: 0.0}) == 0.0


def test_errors_by_bit_width_fall_in_every_layer_and_side(tiny_model, measured):
    stats = measured(tiny_model(layers=2, head_dim=32))
    found = bit_errors(stats, layers_of(stats))
    assert sorted(found) == [0, 1]
    for sides in found.values():
        for errors in sides.values():
            assert list(errors) == [2, 3, 4, 8]
            assert list(errors.values()) == sorted(errors.values(), reverse=True)


def test_a_recipe_without_widths_is_refused(tiny_model, measured):
    stats = measured(tiny_model(layers=2, head_dim=32))
    with pytest.raises(RecipeError, match="does not take"):
        bit_errors(stats, layers_of(stats), load_recipe("fp8"))


def test_the_verdict_as_data_holds_everything(tiny_model, measured):
    data = diagnose(measured(tiny_model(layers=2, head_dim=32)), recipes("int8", "kivi2")).to_dict()
    assert data["tokens"] == "drawn"
    assert {row["recipe"] for row in data["predictions"]} == {"int8", "kivi2"}
    assert data["collapses"] == [row["recipe"] for row in data["predictions"] if row["loss"] >= COLLAPSE]
    assert data["causes"][0]["kind"] == "few_layers"


def test_the_verdict_names_what_was_not_predicted():
    """A default calibration cannot fit the klt recipes: better ones may be missing. Control: with all, nothing more."""
    known = Prediction(recipe="kivi4", bits=4.5, errors={0: 0.001}, loss=0.004)
    missing = Prediction(recipe="klt4", why_not="they lack second moments.")
    told = Diagnosis(predictions=(known, missing), causes=(), real_tokens=True).sentence()
    assert told.endswith("Not predicted, and maybe better: klt4.")
    assert "Not predicted" not in Diagnosis(predictions=(known,), causes=(), real_tokens=True).sentence()
