"""``kvq recipes``."""

import json
import re

import pytest
import yaml

from kvq.recipe import list_recipes, load_recipe


@pytest.mark.parametrize("name", list_recipes())
def test_show_prints_a_file_that_check_accepts(run, tmp_path, name):
    file = tmp_path / "mine.yaml"
    file.write_text(run("recipes", "show", name).stdout)
    assert load_recipe(file) == load_recipe(name)
    assert "is valid" in run("recipes", "check", file).stdout


def test_set_takes_typed_values(run):
    shown = yaml.safe_load(
        run("recipes", "show", "kivi2", "--set", "key.bits=4", "--set", "layers.0-1.key.bits=8").stdout
    )
    assert shown["key"]["bits"] == 4
    assert shown["layers"] == {"0-1": {"key": {"bits": 8}}}


def test_check_against_a_model(run, tiny_checkpoint):
    result = run("recipes", "check", "kivi4", "--model", tiny_checkpoint(layers=3, head_dim=32), "--json", "-")
    checked = json.loads(result.stdout)
    assert checked["valid"]
    assert checked["model"]["quantized_layers"] == 3


def test_unknown_recipes_suggest_the_nearest(refuse):
    refuse("recipes", "show", "kivi22", says=("'kivi22'", "Did you mean 'kivi2'?"))
    refuse("recipes", "show", "zzz", says=("Known: " + ", ".join(list_recipes()),))


def test_bad_recipe_files_are_refused(refuse, tmp_path):
    file = tmp_path / "mine.yaml"
    refuse("recipes", "check", file, says=("does not exist",))
    file.write_text("name: [mine\nkey: {")
    refuse("recipes", "check", file, says=("not readable YAML",))
    file.write_text("- 1\n- 2\n")
    refuse("recipes", "check", file, says=("not a mapping",))
    file.write_bytes(b"\xff\xfe\x00")
    refuse("recipes", "check", file, says=("mine.yaml",))


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("key.bits", "KEY=VALUE"),
        ("=4", "KEY=VALUE"),
        ("key.bits=[", "not readable YAML"),
        ("key={bits: 4, bits: 2}", "stands twice"),
        ("key.bitz=4", "'bitz'"),
        ("key.bits=5", "bits=5"),
        ("nothing=1", "nothing"),
        ("tokens.window=100", "no multiple"),
    ],
)
def test_bad_settings_are_refused(refuse, setting, says):
    refuse("recipes", "show", "kivi2", "--set", setting, says=(says,))


def test_a_group_that_does_not_divide_the_head_is_refused_against_the_model(refuse, tiny_checkpoint):
    model = tiny_checkpoint(head_dim=16)
    refuse("recipes", "check", "int4", "--set", "key.group=12", "--model", model, says=("group=12", "head_dim=16"))


def test_a_layer_pattern_that_matches_nothing_is_refused(refuse, tiny_checkpoint):
    setting = "layers.7.key.bits=4"
    refuse(
        "recipes",
        "check",
        "kivi2",
        "--set",
        setting,
        "--model",
        tiny_checkpoint(head_dim=32),
        says=("'7'", "layers 0 to 1"),
    )


def test_the_list_begins_with_those_to_begin_with(run):
    shown = run("recipes", "list").stdout
    head = shown[: shown.index("Recipes")]
    assert "Recommended" in head
    for name, role in (("klt2", "smallest"), ("klt3", "balanced"), ("klt4", "nearly lossless")):
        assert re.search(rf"{name} +{role} +[0-9.]+ +[0-9.]+ +[0-9.]+x", head)
    rows = json.loads(run("recipes", "list", "--json", "-").stdout)["recommended"]
    assert [row["name"] for row in rows] == ["klt2", "klt3", "klt4"]


def test_a_changed_recipe_is_named_so_everywhere(run, tiny_checkpoint, tmp_path):
    """In the printed recipe, the export's config, card, manifest and dry run, and what inspect says of it. Controls: a
    setting that changes nothing changes no name, and a changed recipe is found by its file."""
    change, name = ("--set", "key.bits=4", "--set", "tokens.sinks=2"), "kivi2+key.bits=4,tokens.sinks=2"
    shown = run("recipes", "show", "kivi2", *change).stdout
    (tmp_path / "mine.yaml").write_text(shown)
    mine = load_recipe(tmp_path / "mine.yaml")
    assert (mine.name, mine.summary) == (name, "kivi2 with key.bits=4, tokens.sinks=2")
    assert load_recipe("kivi2").override({"key.bits": 2}) == load_recipe("kivi2")
    model, out = tiny_checkpoint(layers=2, head_dim=32), tmp_path / "out"
    assert name in run("export", model, "--recipe", "kivi2", *change, "--dry-run", "-o", out).stdout.replace("\n", "")
    run("export", model, "--recipe", "kivi2", *change, "-o", out)
    card = (out / "README.md").read_text()
    assert f"`{name}` (kivi2 with key.bits=4, tokens.sinks=2)" in card
    assert "2-bit keys" not in card
    assert yaml.safe_load(card.split("---")[1])["tags"][-1] == name
    assert name in (out / "config.json").read_text()
    inspected = json.loads(run("inspect", out, "--json", "-").stdout)
    assert name in json.dumps(inspected)
    assert "2-bit keys" not in json.dumps(inspected)
