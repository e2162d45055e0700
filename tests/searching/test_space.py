"""A space expands into options; what cannot be is left out with its reason, and never silently."""

import pytest

from kvq.calib.stats import Stats
from kvq.errors import RecipeError
from kvq.models.describe import describe
from kvq.searching.space import expand, load_space
from kvq.searching.variants import Variants


def test_the_default_space_varies_what_it_promises():
    """Transforms, codecs, bits, clip ratios, group sizes, metadata widths, sinks and windows."""
    data = load_space()
    for side in ("key", "value"):
        families = data[side]
        assert len({repr(f.get("transforms")) for f in families}) > 1
        assert len({f["codec"]["codec"] for f in families}) > 1
        varied = {name for f in families for name in f["vary"]}
        assert {"bits", "clip", "group", "meta"} <= varied
    assert len({(t["sinks"], t["window"]) for t in data["tokens"]}) > 2


def test_options_without_statistics_are_left_out_with_the_reason(searched, space_data):
    _, spec, _ = searched
    space = expand(space_data, spec)
    assert [option.name for option in space.of("key")] == [f"plain bits={bits}" for bits in (2, 4, 8)]
    assert "pass --stats" in space.left_out["key principal bits=2/2"]


def test_token_policies_are_tried_only_where_they_cost(searched, space_data):
    _, spec, stats = searched
    assert len(expand(space_data, spec, stats).tokens) == 1
    assert any(name.startswith("tokens") for name in expand(space_data, spec, stats).left_out)
    assert len(expand(space_data, spec, stats, sees_exact_tokens=True).tokens) == 2


def test_what_does_not_fit_the_model_is_left_out(searched, space_data):
    _, spec, stats = searched
    wide = {"name": "wide", "codec": {"codec": "affine", "bits": 4, "axis": "token"}, "vary": {"group": [32, 64, 48]}}
    space = expand(space_data | {"value": [wide]}, spec, stats)
    assert [option.name for option in space.of("value")] == ["wide group=32"]
    assert "does not divide" in space.left_out["value wide group=64"]
    with pytest.raises(RecipeError, match=r"no option for values on this model.*does not divide"):
        expand(space_data | {"value": [wide | {"vary": {"group": [48]}}]}, spec, stats)


def test_unknown_words_are_refused(searched, space_data):
    _, spec, _ = searched
    with pytest.raises(RecipeError, match=r"keys.*key"):
        expand({"keys": []}, spec)
    with pytest.raises(RecipeError, match="varies"):
        expand(space_data | {"key": [{"name": "x", "codec": {}, "varies": {}}]}, spec)


def test_statistics_that_lack_something_leave_the_option_out(searched, space_data):
    model, spec, stats = searched
    poor = Stats(
        layers={
            i: type(layer)({k: v for k, v in layer.parts.items() if k.endswith("range")})
            for i, layer in stats.layers.items()
        },
        model="",
        model_fingerprint=stats.model_fingerprint,
    )
    variants = Variants(expand(space_data, describe(model.config), poor), spec, poor)
    assert all(option.name.startswith("plain") for option in variants.space.of("key"))
    assert "run 'kvq calibrate' again" in variants.left_out["key principal bits=2/2"]


def test_costs_count_metadata_and_exact_tokens(variants, searched):
    option = variants.space.named("value", "rotated bits=2")
    policy = variants.space.tokens[0]
    # One fp16 pair for the 32 channels of a head.
    assert variants.bits(option, policy, 0) == pytest.approx(2 + 32 / 32)
    # 4 sinks and 32 recent of 136 tokens are exact, in the model's float32.
    assert variants.bits(option, policy, 0, tokens=136) == pytest.approx((100 * 3 + 36 * 32) / 136)
