"""What an engine makes of a folder, as a plan of kvq: from the scales that lie in it, and nothing else."""

import dataclasses
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma3TextConfig

from kvq.codecs.float8 import Float8Codec
from kvq.errors import CheckpointError
from kvq.eval.evaluated_model import load_evaluated
from kvq.eval.two_view import two_view
from kvq.exporting.exporter import export
from kvq.exporting.simulated_engine import is_engine_export, simulated_config, simulated_plan
from kvq.models.resolve import load_model
from kvq.recipe import load_recipe


@pytest.fixture
def source(tiny_checkpoint):
    return tiny_checkpoint(layers=2, head_dim=32, heads=4, kv_heads=2)


@pytest.fixture
def folder(source, tmp_path, made_stats):
    export(source, "fp8", tmp_path / "out", target="vllm", stats=made_stats(source))
    return tmp_path / "out"


def test_the_plan_has_the_folders_own_scales(folder):
    plan = simulated_plan(folder)
    scales = load_file(folder / "kv_scales.safetensors")
    for index, (group,) in plan.layers.items():
        for side, letter in (("key", "k"), ("value", "v")):
            wanted = float(scales[f"model.layers.{index}.self_attn.{letter}_scale"])
            assert group.codecs[side] == Float8Codec(head_dim=32, scale=wanted)
    assert {g.codecs["key"].rounding for (g,) in simulated_plan(folder, "toward_zero").layers.values()} == {
        "toward_zero"
    }


def test_other_scales_give_other_answers(folder):
    """The simulation reads the scales of the folder: with others in it, the logits change."""
    ids = torch.arange(3, 60).unsqueeze(0)
    model = load_model(folder, dtype=torch.float32, config=simulated_config(folder))

    def logits():
        with torch.no_grad(), two_view(model, simulated_plan(folder), "simulate"):
            return model(ids).logits

    before = logits()
    # A folder that kvq vouches for must not be altered, so this one becomes a stranger's.
    shutil.rmtree(folder / "kvq")
    scales = load_file(folder / "kv_scales.safetensors")
    save_file({n: t * 0.01 for n, t in scales.items()}, folder / "kv_scales.safetensors", metadata={"format": "pt"})
    assert not torch.allclose(before, logits(), atol=1e-2)


def test_weights_load_without_the_engines_cache(folder, source):
    assert is_engine_export(folder)
    assert not is_engine_export(source)
    assert getattr(simulated_config(folder), "quantization_config", None) is None
    evaluated = load_evaluated(folder)
    assert evaluated.plan.recipe.name == "fp8"
    plain = load_model(source, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(evaluated.model.parameters(), plain.parameters()))


def test_sliding_layers_are_quantized_as_engines_do(tiny_model, tiny_checkpoint, tmp_path, made_stats):
    config = Gemma3TextConfig(
        num_hidden_layers=2, hidden_size=64, head_dim=32, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=64, vocab_size=128, sliding_window=8, architectures=["Gemma3ForCausalLM"],
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    source = tiny_checkpoint(tiny_model(config), name="gemma")
    export(source, "fp8", tmp_path / "out", target="vllm", stats=made_stats(source))
    plan = simulated_plan(tmp_path / "out")
    assert set(plan.layers) == {0, 1}
    ids = torch.arange(3, 60).unsqueeze(0)
    model = load_model(tmp_path / "out", dtype=torch.float32, config=simulated_config(tmp_path / "out"))
    full_only = dataclasses.replace(plan, layers={1: plan.layers[1]})
    with torch.no_grad():
        plain = model(ids).logits
        with two_view(model, plan, "simulate"):
            both = model(ids).logits
        with two_view(model, full_only, "simulate"):
            one = model(ids).logits
    # The window still hides what lies outside it: 8-bit numbers change little, and the windowed layer adds its share.
    assert 0 < (one - plain).abs().max() < 1
    assert 0 < (both - one).abs().max() < 1


def test_exact_layers_stay_exact(source, tmp_path, made_stats):
    recipe = load_recipe("fp8").override({"layers.1.key.codec": "exact", "layers.1.value.codec": "exact"})
    export(source, recipe, tmp_path / "out", target="vllm", stats=made_stats(source))
    assert set(simulated_plan(tmp_path / "out").layers) == {0}


def test_broken_scales_are_refused(folder):
    scales = load_file(folder / "kv_scales.safetensors")
    scales["model.layers.0.self_attn.k_scale"].fill_(float("nan"))
    save_file(scales, folder / "kv_scales.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="'kvq check' says more"):
        simulated_plan(folder)


def test_a_folder_without_a_quantized_cache_loads_as_it_is(source, tmp_path, stats_of):
    """Transforms in the weights for an engine's own cache: nothing in the config names a quantization."""
    export(source, "qoq4", tmp_path / "own", target="vllm", stats=stats_of(source))
    assert not is_engine_export(tmp_path / "own")
    model = load_model(tmp_path / "own", dtype=torch.float64, config=simulated_config(tmp_path / "own"))
    base = load_model(source, dtype=torch.float64)
    ids = torch.arange(3, 60).unsqueeze(0)
    with torch.no_grad():
        assert (model(ids).logits - base(ids).logits).abs().max() < 1e-3
