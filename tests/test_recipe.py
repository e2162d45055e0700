"""Recipes are validated data: what they say is what every head gets, and every mistake is one sentence."""

import dataclasses
import subprocess
import sys

import pytest
import yaml

from kvq.codecs import codec_spec
from kvq.errors import RecipeError
from kvq.heads import HeadSpec, TokenPolicy
from kvq.recipe import Recipe, list_recipes, load_recipe, parse_recipe

AFFINE = {"codec": "affine", "bits": 2, "axis": "token", "group": 32}
CHANNEL = {"codec": "affine", "bits": 2, "axis": "channel", "group": 32}
UNIT8 = {"codec": "float8", "scale": "unit"}
CALIBRATED8 = {"codec": "float8", "scale": "calibrated"}
BOOK = {"codec": "book", "bits": 3, "levels": "lloyd_max", "scale": "unit"}
CALIBRATED_KEY = {"codec": "book", "bits": 3, "levels": "calibrated", "scale": "calibrated"}
SKETCH = {"codec": "sketch", "bits": 2}
ROTATED = {"key": [{"kind": "hadamard"}]}
BASE = {"name": "mine", "tokens": {"sinks": 0, "window": 128}, "key": CHANNEL, "value": AFFINE}


def recipe(**changes) -> Recipe:
    return parse_recipe(BASE | changes, source="mine")


def refusal(build, *arguments) -> str:
    with pytest.raises(RecipeError) as error:
        build(*arguments)
    text = str(error.value)
    assert "\n" not in text
    return text


def test_the_shipped_recipes_are_these():
    assert set(list_recipes()) >= {"fp16", "fp8", "int8", "int4", "kivi4", "kivi2"}


@pytest.mark.parametrize("name", list_recipes())
def test_a_shipped_recipe_is_whole_and_bears_its_files_name(name):
    shipped = load_recipe(name)
    assert shipped.name == name
    assert shipped.summary
    assert load_recipe(shipped) is shipped


@pytest.mark.parametrize("name", list_recipes())
def test_the_canonical_form_survives_yaml(name, tmp_path):
    shipped = load_recipe(name)
    file = tmp_path / "copy.yaml"
    file.write_text(shipped.to_yaml())
    again = load_recipe(file)
    assert again == shipped
    assert again.hash == shipped.hash
    assert again.to_yaml() == shipped.to_yaml()


def test_layers_and_order_survive_yaml():
    layers = {"0-3": {"key": {"bits": 4}}, "1/0": {"tokens": {"sinks": 4}}, "-1": {"value": {"bits": 8}}}
    mine = recipe(layers=layers)
    again = parse_recipe(yaml.safe_load(mine.to_yaml()), source="again")
    assert list(again.layers) == list(layers)
    assert again.hash == mine.hash


def test_kivi2_is_the_published_layout():
    head = load_recipe("kivi2").for_head(0, 0, 1)
    assert (head.key.axis, head.value.axis, head.key.bits, head.value.bits) == ("channel", "token", 2, 2)
    assert (head.key.group, head.value.group, head.tokens.window, head.tokens.sinks) == (32, 32, 128, 0)


def test_fp16_alone_is_exact():
    assert [name for name in list_recipes() if load_recipe(name).is_exact] == ["fp16"]
    exact = {"codec": "exact"}
    layers = {"0": {"key": AFFINE, "value": AFFINE}}
    assert not parse_recipe({"name": "x", "key": exact, "value": exact, "layers": layers}, source="x").is_exact


def bits(mine: Recipe, layers: int = 6, heads: int = 2) -> list[list[int]]:
    return [[mine.for_head(i, h, layers).key.bits for h in range(heads)] for i in range(layers)]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("2", [[2, 2], [2, 2], [8, 8], [2, 2], [2, 2], [2, 2]]),
        ("0-1", [[8, 8], [8, 8], [2, 2], [2, 2], [2, 2], [2, 2]]),
        ("0,3-4", [[8, 8], [2, 2], [2, 2], [8, 8], [8, 8], [2, 2]]),
        ("-1", [[2, 2], [2, 2], [2, 2], [2, 2], [2, 2], [8, 8]]),
        ("0,-2", [[8, 8], [2, 2], [2, 2], [2, 2], [8, 8], [2, 2]]),
        ("1-2/1", [[2, 2], [2, 8], [2, 8], [2, 2], [2, 2], [2, 2]]),
    ],
)
def test_a_pattern_reaches_its_layers_and_heads_only(pattern, expected):
    assert bits(recipe(layers={pattern: {"key": {"bits": 8}}})) == expected


def test_later_patterns_win_and_parts_add_up():
    mine = recipe(layers={"0-1": {"key": {"bits": 4}, "tokens": {"sinks": 4}}, "1": {"key": {"bits": 8}}})
    assert [row[0] for row in bits(mine)] == [4, 8, 2, 2, 2, 2]
    second = mine.for_head(1, 0, 6)
    assert second.tokens == TokenPolicy(sinks=4, window=128)
    assert second.value == mine.value


def test_naming_another_codec_starts_from_nothing():
    mine = recipe(layers={"0": {"key": {"codec": "float8", "scale": "unit"}}})
    assert mine.for_head(0, 0, 2).key == codec_spec(codec="float8", scale="unit")


def test_patterns_are_checked_against_the_model():
    mine = recipe(layers={"1-2": {"key": {"bits": 4}}, "3/1": {"key": {"bits": 8}}})
    mine.check_patterns(4, {1: 2, 3: 2})
    assert "matches nothing: this model has layers 0 to 0" in refusal(mine.check_patterns, 1, {0: 2})
    assert "'3/1' matches nothing" in refusal(mine.check_patterns, 4, {1: 2, 3: 1})
    assert "no layer with a quantizable cache" in refusal(mine.check_patterns, 4, {})


def test_settings_override_like_the_command_line():
    mine = recipe().override({"key.bits": 4, "tokens.window": 64, "layers.0-1.key.bits": 8, "layers.0-1.value.bits": 3})
    assert mine.key == codec_spec(**(CHANNEL | {"bits": 4}))
    assert mine.tokens == TokenPolicy(window=64)
    assert mine.for_head(1, 0, 4).key.bits == 8
    assert mine.for_head(1, 0, 4).value.bits == 3
    assert mine.for_head(2, 0, 4).key.bits == 4
    assert recipe().override({}) == recipe()


def test_parts_that_wrap_a_codec_are_data_too():
    mine = recipe(key=CHANNEL | {"outliers": {"share": 0.02, "along": "channel"}, "norm": {"over": "token"}})
    assert mine.key.part("outliers").share == 0.02
    again = parse_recipe(yaml.safe_load(mine.to_yaml()), source="again")
    assert again == mine
    assert again.hash == mine.hash != recipe().hash
    assert mine.override({"key.outliers": None}).key.part("outliers") is None
    assert mine.override({"key.norm": {"over": "head"}}).key.part("norm").over == "head"
    layered = recipe(layers={"1": {"key": {"low_rank": {"rank": 2, "block": 64}}}})
    assert layered.for_head(1, 0, 2).key.part("low_rank").block == 64
    assert layered.for_head(0, 0, 2).key.part("low_rank") is None


def test_overriding_the_codec_drops_the_old_codecs_settings():
    mine = load_recipe("fp8").override({"key.scale": "unit", "value.scale": "unit"})
    assert mine.for_head(0, 0, 1).key.scale == "unit"
    assert load_recipe("fp8").for_head(0, 0, 1).key.scale == "calibrated"


def test_the_hash_is_of_what_is_stored_not_of_its_name():
    base = recipe()
    assert dataclasses.replace(base, name="other", summary="s", paper="p").hash == base.hash
    variants = [
        base.override({"key.bits": 4}),
        base.override({"value.group": 64}),
        base.override({"tokens.sinks": 1}),
        base.override({"layers.0.key.bits": 4}),
        recipe(layers={"0": {"key": {"bits": 4}}, "0-1": {"key": {"bits": 8}}}),
        recipe(layers={"0-1": {"key": {"bits": 8}}, "0": {"key": {"bits": 4}}}),
    ]
    assert len({base.hash, *(variant.hash for variant in variants)}) == 7


def test_the_hash_is_the_same_in_another_process():
    code = "from kvq.recipe import load_recipe; print(load_recipe('kivi2').hash)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == load_recipe("kivi2").hash


@pytest.mark.parametrize(("group", "head_dim", "expected"), [(32, 64, 32), ("head", 80, 80), (64, 128, 64)])
def test_a_token_group_divides_the_head(group, head_dim, expected):
    assert codec_spec(**(AFFINE | {"group": group})).group_size(head_dim) == expected


def test_a_group_that_does_not_divide_names_those_that_do():
    assert refusal(codec_spec(**(AFFINE | {"group": 96})).group_size, 128) == (
        "group=96 does not divide head_dim=128; use 16, 32, 64, 128 or 'head'."
    )


BAD_DATA = [
    ({"key": AFFINE | {"bits": 5}}, "bits=5 is not a packed width: use one of 2, 3, 4, 8"),
    ({"key": AFFINE | {"bits": True}}, "bits=True"),
    ({"key": AFFINE | {"bits": "4"}}, "bits='4'"),
    ({"key": AFFINE | {"axis": "row"}}, "axis='row' is not an axis: use 'token' or 'channel'"),
    ({"key": AFFINE | {"group": 0}}, "group=0 is not a group size"),
    ({"key": CHANNEL | {"group": 24}}, "group=24 does not divide a page of tokens"),
    ({"key": CHANNEL | {"group": "head"}}, "group='head'"),
    ({"key": {"codec": "afine"}}, "unknown codec 'afine'. Did you mean 'affine'?"),
    ({"key": {"codec": ["affine"]}}, "codec"),
    ({"key": {"codec": "affine", "bits": 2}}, "codec 'affine' needs 'axis'"),
    ({"key": {"codec": "exact", "bits": 2}}, "codec 'exact' has no setting 'bits' (it takes no settings)"),
    ({"key": {"bits": 2}}, "lacks a required setting"),
    ({"key": AFFINE | {"bit": 2}}, "has no setting 'bit'. Did you mean 'bits'?"),
    ({"key": 4}, "key is 4, not a mapping"),
    ({"key": {"codec": "float8", "scale": "static"}}, "scale='static' is not a float8 scale"),
    ({"key": CALIBRATED8 | {"method": "median"}}, "method='median'"),
    ({"key": CALIBRATED8 | {"granularity": "channel"}}, "granularity='channel'"),
    ({"key": CALIBRATED8 | {"method": "percentile"}}, "belong together"),
    ({"key": CALIBRATED8 | {"percentile": 99}}, "belong together"),
    ({"key": CALIBRATED8 | {"method": "percentile", "percentile": 50}}, "percentile=50 is no percentile"),
    ({"key": UNIT8 | {"granularity": "head"}}, "granularity says how a scale is calibrated"),
    ({"key": UNIT8 | {"method": "mse"}}, "method says how a scale is calibrated"),
    ({"key": {"codec": "exact"}}, "set both or none"),
    ({"tokens": {"window": -1}}, "tokens.window=-1 is not a number of tokens"),
    ({"tokens": {"sinks": 1.5}}, "tokens.sinks=1.5"),
    ({"tokens": {"window": 2**40}}, "is more than any context"),
    ({"key": AFFINE | {"bits": 4.0}}, "bits=4.0 is not a packed width"),
    ({"key": AFFINE | {"clip": float("nan")}}, "clip=nan is not a share of the range"),
    ({"tokens": {"window": 100}}, "tokens.window=100 is no multiple of key.group=32"),
    ({"tokens": {"recent": 3}}, "has no setting 'recent'"),
    ({"tokens": [1]}, "not a mapping"),
    ({"layers": {"first": {"key": {"bits": 4}}}}, "layer pattern 'first' is not understood"),
    ({"layers": {"0": {}}}, "layers['0'] is empty"),
    ({"layers": {"0": {"keys": {"bits": 4}}}}, "has no setting 'keys'. Did you mean 'key'?"),
    ({"layers": {"0": {"key": {"bits": 5}}}}, "bits=5"),
    ({"layers": {"0": {"key": 4}}}, "not a mapping"),
    ({"layers": {"0": {"tokens": {"window": 5}}}}, "no multiple"),
    ({"layers": ["0"]}, "not a mapping of patterns"),
    ({"name": 3}, "name is 3, not text"),
    ({"summary": ["a"]}, "not text"),
    ({"keys": AFFINE}, "has no setting 'keys'"),
    ({"key": BOOK | {"bits": 8}}, "bits=8 is not a packed width: use one of 2, 3, 4"),
    ({"key": BOOK | {"levels": "k_means"}}, "levels='k_means' is not known: use 'lloyd_max'"),
    ({"key": BOOK | {"scale": "max"}}, "scale='max' is not a book scale"),
    ({"key": BOOK | {"scale": "range"}}, "scale=range is taken over groups and needs 'axis'"),
    ({"key": BOOK | {"axis": "token", "group": 16}}, "scale=unit is static and has no groups"),
    ({"key": BOOK | {"levels": "uniform"}}, "levels=uniform go from -1 to 1"),
    ({"key": BOOK | {"levels": "calibrated"}}, "levels=calibrated are learned between the ends of a range"),
    ({"key": BOOK | {"q_norm": True}}, "weights and q_norm belong to calibrated levels"),
    ({"key": BOOK | {"norm": {"over": "layer"}}}, "norm.over='layer'"),
    ({"key": BOOK | {"norm": "head"}}, "norm is 'head', not a mapping"),
    ({"key": BOOK | {"norm": {}}}, "norm is incomplete"),
    ({"key": AFFINE | {"meta": "int8"}}, "meta='int8' is not metadata of affine"),
    ({"key": AFFINE | {"meta": "range8"}}, "use axis channel, or meta zero8"),
    ({"key": AFFINE | {"meta": "zero8", "symmetric": True}}, "symmetric codes have no minimum"),
    ({"key": AFFINE | {"symmetric": "yes"}}, "symmetric='yes' is neither true nor false"),
    ({"key": AFFINE | {"clip": 2}}, "clip=2 is not a share of the range"),
    ({"key": CHANNEL | {"permute": {"by": "range"}}}, "axis channel has groups of tokens"),
    ({"key": AFFINE | {"group": "head", "permute": {"by": "range"}}}, "permute does nothing to group='head'"),
    ({"key": BOOK | {"permute": {"by": "range"}}}, "scale=unit has none: remove it"),
    ({"key": UNIT8 | {"permute": {"by": "range"}}}, "float8 has no groups"),
    ({"key": AFFINE | {"outliers": {"share": 0.01, "along": "channel"}}}, "this codec has none"),
    ({"key": AFFINE | {"outliers": {"share": 0, "along": "token"}}}, "outliers.share=0 is not a share"),
    ({"key": AFFINE | {"low_rank": {"rank": 2, "block": 20}}}, "low_rank.block=20"),
    ({"key": AFFINE | {"low_rank": {"rank": 0, "block": 64}}}, "low_rank.rank=0 is not a rank"),
    ({"key": AFFINE | {"low_rank": {"rank": 2, "block": 256}}}, "no multiple of key.low_rank.block=256"),
    ({"key": CALIBRATED_KEY | {"norm": {"over": "head"}}}, "norm changes the numbers that scale=calibrated"),
    ({"key": CALIBRATED_KEY, "transforms": ROTATED}, "what calibration made for the codec is of keys without"),
    ({"key": {"codec": "float4", "group": 64, "meta": "e8m0"}}, "group=64 is not a block of float4"),
    ({"key": {"codec": "float4", "group": 16, "meta": "e4m3"}}, "meta=e4m3 needs scale=unit"),
    ({"key": SKETCH | {"outlier_channels": 4}}, "outlier_channels, outlier_bits and group belong together"),
    ({"key": SKETCH | {"outlier_channels": 0, "outlier_bits": 1, "group": 32}}, "outlier_channels=0 is not a count"),
    ({"key": SKETCH | {"low_rank": {"rank": 2, "block": 64}}}, "codec 'sketch' has no setting 'low_rank'"),
    ({"value": SKETCH}, "use it for keys only"),
    ({"value": AFFINE | {"placement": "pre_rope"}}, "values have no rotary embedding"),
]


@pytest.mark.parametrize(("change", "reason"), BAD_DATA, ids=[reason[:40] for _, reason in BAD_DATA])
def test_bad_data_is_one_sentence(change, reason):
    assert reason in refusal(parse_recipe, BASE | change, "mine")


@pytest.mark.parametrize("missing", ["name", "key", "value"])
def test_a_missing_part_is_named(missing):
    data = {name: value for name, value in BASE.items() if name != missing}
    assert f"lacks {missing!r}" in refusal(parse_recipe, data, "mine")


@pytest.mark.parametrize("pattern", ["3-1", "-2-1", "0/-1", "1--2", "--", ",", "0/1/2"])
def test_a_malformed_pattern_is_refused_for_every_model(pattern):
    heads_of = dict.fromkeys(range(4), 2)
    assert f"pattern {pattern!r}" in refusal(
        lambda: recipe(layers={pattern: {"key": {"bits": 4}}}).check_patterns(4, heads_of)
    )


def test_tokens_of_a_layer_must_be_a_mapping():
    assert "not a mapping" in refusal(lambda: recipe(layers={"0": {"tokens": 4}}))


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"bits": 4}, "setting 'bits' is not understood"),
        ({"key": 4}, "not understood"),
        ({"keys.bits": 4}, "not understood"),
        ({"layers.0.key": 4}, "not understood"),
        ({"key.bits": 5}, "bits=5"),
        ({"key.colour": 5}, "'colour'"),
        ({"layers.x.key.bits": 4}, "layer pattern 'x'"),
        ({"tokens.window": 100}, "no multiple"),
    ],
)
def test_a_bad_setting_is_one_sentence(setting, reason):
    assert reason in refusal(recipe().override, setting)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"name: [", "not readable YAML at line"),
        (b"a: b: c", "not readable YAML at line 1"),
        (b"- a", "is not a mapping"),
        (b"", "is not a mapping"),
        (b"\xff\xfe\xff", "cannot be read"),
        (b"name: a\0", "not readable YAML"),
        (b"name: a\nkey: {bits: 4, bits: 2}", "at line 2: 'bits' stands twice"),
        (b"[" * 5000, "not readable YAML"),
        (b"#" * (1 << 20) + b"#", "1048577 characters"),
    ],
)
def test_an_unreadable_file_is_one_sentence(tmp_path, content, reason):
    file = tmp_path / "bad.yaml"
    file.write_bytes(content)
    assert reason in refusal(load_recipe, file)


def test_unknown_names_suggest_the_nearest():
    assert refusal(load_recipe, "kivi3").startswith("unknown recipe 'kivi3'. Did you mean 'kivi")
    assert f"Known: {', '.join(list_recipes())}." in refusal(load_recipe, "zzzzzzzz")
    assert "does not exist: check the path" in refusal(load_recipe, "none/at/all.yaml")


def test_recipes_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe().name = "other"
    head = recipe().for_head(0, 0, 1)
    assert head == HeadSpec(key=recipe().key, value=recipe().value, tokens=recipe().tokens)


@pytest.mark.parametrize("name", ["a|b", "x: y\n- z", "<script>", "a`b", "a" * 501, "a\x1b[31m"])
def test_a_name_that_would_be_more_than_a_name_in_a_card_is_refused(name):
    """Cards hold it in headings, tables and front matter. Control: names of changed recipes."""
    with pytest.raises(RecipeError, match="no name of a recipe"):
        dataclasses.replace(load_recipe("int4"), name=name)
    changed = "kivi2+key.bits=4, value.group=[16]"
    assert dataclasses.replace(load_recipe("int4"), name=changed).name == changed
