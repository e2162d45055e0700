"""What the weights already show of a recipe that will ruin a model is said before anything is written."""

import json

import pytest
import torch
from transformers import Qwen2Config

from kvq.diagnosis.causes import causes_of_weights, endangered
from kvq.models.describe import describe
from kvq.models.resolve import load_config
from kvq.models.stored import Weights
from kvq.recipe import load_recipe

SAFE = {"fp16", "kivi4", "kivi2", "biassafe4", "klt4", "klt2", "kvquant4"}
RUINED = {"int8", "int4", "int2", "turboquant4", "quarot4", "nf4"}


@pytest.fixture
def biased(tiny_model, tiny_checkpoint):
    """``biased(size) -> folder``: a constant of ``size`` on a channel of every key, as Qwen2.5 has it."""

    def make(size: float):
        config = Qwen2Config(
            vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2,
        )  # fmt: skip
        model = tiny_model(config)
        for layer in model.model.layers:
            torch.nn.init.zeros_(layer.self_attn.k_proj.bias)
            layer.self_attn.k_proj.bias.data[31::32] = size
        return tiny_checkpoint(model, name=f"biased{size:g}")

    return make


@pytest.mark.parametrize("recipe", ["int4", "kivi2"])
@pytest.mark.parametrize("size", [300.0, 0.5])
def test_export_and_dry_run_name_it(run, biased, tmp_path, recipe, size):
    """With recipes that are safe. Controls: a safe recipe, and a model without such a bias."""
    model, warns = biased(size), recipe == "int4" and size > 1
    for extra in (("--dry-run",), ("-o", tmp_path / "out")):
        said = " ".join(run("export", model, "--recipe", recipe, *extra).stdout.split())
        assert ("'int4' is likely to ruin this model" in said) == warns
        assert ("kivi4" in said and "biassafe4" in said) == warns


def test_doctor_names_it(run, biased):
    for size in (300.0, 0.5):
        folder = biased(size)
        assert ("biassafe4" in run("doctor", folder).stdout) == (size > 1)
        causes = json.loads(run("doctor", folder, "--json", "-").stdout)
        assert ("key_bias" in [cause["kind"] for cause in causes["model"]["causes"]]) == (size > 1)


def test_every_recipe_is_safe_or_not_by_what_it_does_to_keys(biased):
    folder = biased(300.0)
    causes = causes_of_weights(describe(load_config(folder)), Weights(folder))
    found = {name: endangered(load_recipe(name), causes) is None for name in SAFE | RUINED}
    assert found == dict.fromkeys(SAFE, True) | dict.fromkeys(RUINED, False)
