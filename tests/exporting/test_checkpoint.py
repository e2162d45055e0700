"""The on-disk contract: what is written is read back, and anything else is refused with a sentence."""

import hashlib
import json
import math

import pytest
import torch
from safetensors.torch import save

from kvq.cache import make_plan
from kvq.calib.artefacts import needed_artefacts
from kvq.errors import CheckpointError, RecipeError
from kvq.exporting.checkpoint import (
    ARTEFACTS,
    FIELDS,
    PROVENANCE,
    RECIPE,
    build_config,
    check_config,
    load_plan,
    provenance_of,
    side_files,
)
from kvq.models.describe import describe
from kvq.recipe import load_recipe


def made_up(needed):
    """Artefacts with a number of their own each."""
    return {
        name: torch.full(own.shape, 0.1 * (i + 1), dtype=torch.float64) for i, (name, own) in enumerate(needed.items())
    }


@pytest.fixture
def written(tmp_path, tiny_config):
    """Factory ``written(recipe="kivi2") -> (folder, quantization_config, model_config)``: the side files of a plan."""

    def write(recipe="kivi2"):
        config = tiny_config(layers=3, head_dim=32)
        spec = describe(config)
        recipe = load_recipe(recipe)
        artefacts = made_up(needed_artefacts(recipe, spec))
        plan = make_plan(recipe, spec, artefacts)
        provenance = provenance_of(plan, base_name="tiny", weights_fingerprint="0" * 64, stats=None)
        files = side_files(plan, artefacts, provenance)
        (tmp_path / "kvq").mkdir()
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
        fields = build_config(plan, weights_fingerprint="0" * 64, files=files, copied=["tokenizer.json"])
        return tmp_path, json.loads(json.dumps(fields)), config

    return write


def replace_artefacts(folder, fields, tensors):
    """Swap the artefacts and their hash: a file that is consistent and wrong."""
    content = save(tensors, metadata={"format": "pt"})
    (folder / ARTEFACTS).write_bytes(content)
    fields["files"][ARTEFACTS] = hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("name", ["fp16", "int4", "kivi2", "fp8"])
def test_round_trip(written, name):
    """load_plan(write(plan)) = plan: recipe, layers, and scales to the last bit."""
    folder, fields, config = written(name)
    plan = load_plan(folder, fields, config)
    recipe = load_recipe(name)
    artefacts = made_up(needed_artefacts(recipe, describe(config)))
    assert plan == make_plan(recipe, describe(config), artefacts)
    assert set(fields) == set(FIELDS)


def test_order_of_layer_patterns_survives_sorted_keys(written):
    """Later patterns win; transformers sorts config.json's keys, and the recipe must not change by that."""
    recipe = load_recipe("int4").override({"layers.1-2.key.bits": 8, "layers.0-1.key.bits": 2})
    assert list(recipe.layers) != sorted(recipe.layers)
    folder, fields, config = written(recipe)
    plan = load_plan(folder, json.loads(json.dumps(fields, sort_keys=True)), config)
    assert plan.recipe == recipe
    assert plan.layers[1][0].codecs["key"].bits == 2


def test_same_input_same_bytes(tiny_config):
    artefacts = dict.fromkeys(_names(tiny_config()), torch.tensor(0.5, dtype=torch.float64))
    plan = make_plan(load_recipe("fp8"), describe(tiny_config()), artefacts)
    once, again = (side_files(plan, artefacts, {"b": 1, "a": 2}) for _ in range(2))
    assert once == again


def _names(config):
    return tuple(needed_artefacts(load_recipe("fp8"), describe(config)))


@pytest.mark.parametrize("name", [ARTEFACTS, PROVENANCE, RECIPE])
@pytest.mark.parametrize("change", ["remove", "alter", "truncate"])
def test_a_side_file_that_is_missing_or_altered_is_refused(written, name, change):
    folder, fields, config = written("fp8")
    path = folder / name
    content = path.read_bytes()
    if change == "remove":
        path.unlink()
    else:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if change == "alter" else content[:-1])
    with pytest.raises(CheckpointError, match=name.split("/")[-1]):
        load_plan(folder, fields, config)


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("schema_version", 2, "written by kvq 9.9"),
        ("schema_version", "1", "schema_version '1'"),
        ("schema_version", True, "schema_version True"),
        ("quant_method", "awq", "'awq'"),
        ("speed", 11, "unknown field 'speed', written by kvq 9.9"),
        ("recipe", [], "'recipe', a dict"),
        ("recipe_hash", "0" * 64, "does not have the hash"),
        ("model_fingerprint", "0" * 64, "another shape"),
        ("files", {}, "lists the side files"),
        ("files", {ARTEFACTS: "x", PROVENANCE: "0" * 64, RECIPE: "0" * 64}, "SHA-256"),
        ("copied", ["../../secret"], "no file of this folder"),
    ],
)
def test_fields_are_checked(written, field, value, match):
    folder, fields, config = written()
    load_plan(folder, fields, config)
    with pytest.raises(CheckpointError, match=match):
        load_plan(folder, fields | {"kvq_version": "9.9", field: value}, config)


@pytest.mark.parametrize("field", sorted(FIELDS))
def test_a_missing_field_is_refused(written, field):
    _, fields, _ = written()
    del fields[field]
    with pytest.raises(CheckpointError):
        check_config(fields)


def test_an_altered_recipe_is_refused(written):
    """Another number in the recipe either breaks the hash or cannot be a recipe at all."""
    folder, fields, config = written("int4")
    fields["recipe"]["key"]["bits"] = 8
    with pytest.raises(CheckpointError, match="hash"):
        load_plan(folder, fields, config)
    fields["recipe"]["key"]["bits"] = 5
    with pytest.raises(RecipeError, match="bits=5"):
        load_plan(folder, fields, config)
    fields["recipe"]["layers"] = {"0": {"key": {"bits": 8}}}
    with pytest.raises(CheckpointError, match="list of pairs"):
        load_plan(folder, fields, config)


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan, [1.0, 2.0]])
def test_scales_must_be_finite_positive_scalars(written, value):
    folder, fields, config = written("fp8")
    names = _names(config)
    replace_artefacts(folder, fields, {n: torch.tensor(0.5, dtype=torch.float64) for n in names})
    load_plan(folder, fields, config)
    bad = {n: torch.tensor(value if n == names[2] else 0.5, dtype=torch.float64) for n in names}
    replace_artefacts(folder, fields, bad)
    with pytest.raises(CheckpointError, match=r"NaN or infinity|not positive|of shape"):
        load_plan(folder, fields, config)


def test_scales_must_be_those_that_the_recipe_reads(written):
    folder, fields, config = written("fp8")
    scales = {n: torch.tensor(0.5, dtype=torch.float64) for n in _names(config)}
    replace_artefacts(folder, fields, scales | {"layers.9.key.scale": torch.tensor(1.0)})
    with pytest.raises(CheckpointError, match=r"unknown tensor 'layers\.9"):
        load_plan(folder, fields, config)
    scales.pop("layers.2.value.scale")
    replace_artefacts(folder, fields, scales)
    with pytest.raises(CheckpointError, match=r"lacks 'layers\.2"):
        load_plan(folder, fields, config)


def test_another_models_export_is_refused(written, tiny_config):
    folder, fields, _ = written()
    with pytest.raises(CheckpointError, match="another shape"):
        load_plan(folder, fields, tiny_config(layers=4, head_dim=32))
