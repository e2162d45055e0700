"""Keys of kept answers: what decides an answer changes them, and nothing else does."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import kvq
from kvq.cache import make_plan
from kvq.eval import identity
from kvq.eval.evaluated_model import load_evaluated
from kvq.eval.identity import answers_key, model_hash, plan_hash
from kvq.exporting.exporter import export
from kvq.integrations.runtime import running
from kvq.models.describe import describe
from kvq.recipe import load_recipe


@pytest.fixture
def folder(tiny_checkpoint):
    return tiny_checkpoint(head_dim=32)


def plan_of(model, recipe, **artefacts):
    return make_plan(recipe, describe(model.config), artefacts or None)


def test_plans_that_store_other_numbers_have_other_hashes(tiny_model):
    model, kivi = tiny_model(head_dim=32), load_recipe("kivi2")
    recipes = [kivi, load_recipe("int4"), load_recipe("int8")]
    recipes += [kivi.override({"tokens.sinks": 2}), kivi.override({"tokens.window": 64})]
    recipes += [kivi.override({"layers.0.key.bits": 4}), kivi.override({"transforms.value": [{"kind": "hadamard"}]})]
    recipes += [kivi.override({"key.placement": "pre_rope"})]
    hashes = [plan_hash(plan_of(model, recipe)) for recipe in recipes]
    assert len(set(hashes)) == len(recipes)
    assert hashes == [plan_hash(plan_of(model, recipe)) for recipe in recipes]
    assert plan_hash(plan_of(model, load_recipe("fp16"))) == plan_hash(None) == "exact"


def test_a_plan_that_was_used_is_the_same_plan(tiny_model):
    """What it has put on a device and chosen on the way is no part of it."""
    model = tiny_model(head_dim=32)
    plan = plan_of(model, load_recipe("int4").override({"transforms.value": [{"kind": "hadamard"}]}))
    before = plan_hash(plan)
    with running(model, plan):
        model.generate(torch.ones(1, 9, dtype=torch.long), max_new_tokens=3, do_sample=False)
    assert plan_hash(plan) == before


def test_artefacts_count(tiny_model):
    model = tiny_model(head_dim=32)
    scales = {f"layers.{i}.{side}.scale": torch.tensor(1.0) for i in range(2) for side in ("key", "value")}
    first = plan_hash(plan_of(model, load_recipe("fp8"), **scales))
    scales["layers.1.value.scale"] = torch.tensor(1.0000001)
    assert plan_hash(plan_of(model, load_recipe("fp8"), **scales)) != first


def test_what_cannot_be_looked_into_is_refused(tiny_model):
    class Opaque:
        __slots__ = ()

    with pytest.raises(TypeError, match="Opaque"):
        identity._feed(__import__("hashlib").sha256(), Opaque())
    with pytest.raises(TypeError, match="function"):
        identity._feed(__import__("hashlib").sha256(), lambda: None)


def test_one_changed_weight_makes_another_model(folder, tmp_path):
    before = model_hash(folder)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert model_hash(copy) == before
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"][3] += 1e-3
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert model_hash(copy) != before


def test_an_export_of_unchanged_weights_is_the_same_model(folder, tmp_path):
    export(folder, "kivi2", tmp_path / "out")
    assert model_hash(tmp_path / "out") == model_hash(folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": 5.0, "rope_type": "default"}
    (folder / "config.json").write_text(json.dumps(config))
    assert model_hash(tmp_path / "out") != model_hash(folder)


def test_keys_hold_all_that_decides_an_answer(folder, monkeypatch):
    evaluated = load_evaluated(folder, "int4")
    key = answers_key(evaluated, task="text", mode="stream")
    others = [
        answers_key(evaluated.exact, task="text", mode="stream"),
        answers_key(replace(evaluated, plan=evaluated.plan_for("int8")), task="text", mode="stream"),
        answers_key(evaluated, task="text", mode="prefill"),
        answers_key(evaluated, task="needle", mode="stream"),
        answers_key(load_evaluated(folder, "int4", dtype=torch.float64), task="text", mode="stream"),
    ]
    monkeypatch.setattr(identity, "code_version", lambda: "another")
    others.append(answers_key(evaluated, task="text", mode="stream"))
    assert len({json.dumps(own, sort_keys=True) for own in [key, *others]}) == 7
    assert str(folder) not in json.dumps(key)


def test_the_code_version_covers_what_computes_and_not_what_shows():
    files = identity._deciding(Path(kvq.__file__).parent)
    covered = {name.split("/")[0] for name in files}
    assert {"cache", "kernels", "codecs", "pages", "integrations", "transforms", "recipe.py"} <= covered
    assert {"eval/two_view.py", "eval/two_view_attention.py", "eval/lm_head.py"} <= set(files)
    assert any(name.endswith(".cpp") for name in files)
    assert not {"report", "commands"} & covered
    assert "eval/gate.py" not in files
    assert len(identity.code_version()) == 64
