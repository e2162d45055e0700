"""transformers loads the compressed-tensors export with the compressed-tensors package: an independent reader."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from kvq.eval.two_view import two_view
from kvq.exporting.exporter import export
from kvq.exporting.simulated_engine import simulated_config, simulated_plan
from kvq.models.describe import describe
from kvq.models.resolve import load_config, load_model
from kvq.recipe import load_recipe

pytest.importorskip("compressed_tensors", reason="the extra 'targets' is not installed")
# transformers 5.21 fails on a config without weight groups (kvq/exporting/engines/transformers.yaml).
pytestmark = pytest.mark.xfail(
    transformers.__version__.startswith("5.21."), reason="transformers 5.21 fails on a KV-only config", strict=True
)


@pytest.fixture(params=["tensor", "head"])
def folder(request, tiny_checkpoint, tmp_path, stats_of):
    source = tiny_checkpoint(layers=3, head_dim=32, heads=4, kv_heads=2)
    recipe = load_recipe("fp8").override({f"{side}.granularity": request.param for side in ("key", "value")})
    export(source, recipe, tmp_path / "out", target="compressed-tensors", stats=stats_of(source))
    return tmp_path / "out"


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, output_loading_info=True)


def test_every_key_is_expected_and_found(folder):
    model, report = load(folder)
    assert {name: set(keys) for name, keys in report.items()} == {
        "missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": set(),
    }  # fmt: skip
    held = {n: p.flatten().tolist() for n, p in model.named_parameters() if n.endswith(("k_scale", "v_scale"))}
    for index, groups in simulated_plan(folder).layers.items():
        for side, letter in (("key", "k"), ("value", "v")):
            assert held[f"model.layers.{index}.self_attn.{letter}_scale"] == [g.codecs[side].scale for g in groups]
    assert len(held) == 2 * len(describe(load_config(folder)).full_layers)


def test_a_missing_scale_is_not_noticed_by_transformers(folder):
    """Why ``kvq check`` exists: without the file of the scales the model loads, with anything in their place."""
    (folder / "kv_scales.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.unlink()
    (folder / "model-00001-of-00001.safetensors").rename(folder / "model.safetensors")
    _, report = load(folder)
    assert len(report["missing_keys"]) == 6


def test_its_answers_are_those_of_kvqs_simulation(folder):
    """Keys and values rounded on every update, in one forward, equal kvq's mode ``simulate``; the plain model does not.

    In float64, so that no number lies so near the middle of two FP8 numbers that the order of sums decides.
    """
    ids = torch.arange(3, 90).unsqueeze(0)
    theirs, _ = load(folder)
    ours = load_model(folder, dtype=torch.float64, config=simulated_config(folder))
    with torch.no_grad():
        reference = theirs(ids, use_cache=True).logits
        plain = ours(ids).logits
        with two_view(ours, simulated_plan(folder), "simulate"):
            logits = ours(ids).logits
    assert (logits - reference).abs().max() < 1e-6
    assert (plain - reference).abs().max() > 1e-2
