"""Transforms in the weights of what engines serve: with their own cache dtypes, and with FP8 scales behind them."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Gemma3TextConfig, Qwen3Config

from kvq.calib.collect import collect
from kvq.calib.needs import ALL_NEEDS
from kvq.errors import RecipeError
from kvq.exporting.check import check_folder
from kvq.exporting.check.recipe_support import express
from kvq.exporting.engines import engines, find_release
from kvq.exporting.exporter import export
from kvq.exporting.simulated_engine import simulated_config, simulated_plan
from kvq.exporting.targets import TARGETS
from kvq.exporting.targets.native_dtypes import native_dtype
from kvq.models.describe import describe
from kvq.models.resolve import load_config, load_model, weights_fingerprint
from kvq.recipe import load_recipe

FOLDS = {"transforms.key": [{"kind": "smooth"}], "transforms.value": [{"kind": "hadamard"}]}
INT4, FP8 = load_recipe("int4").override(FOLDS), load_recipe("fp8").override(FOLDS)
ENGINE_TARGETS = [name for name in TARGETS if name not in ("kvq", "plain")]
WINDOWS = torch.randint(3, 100, (4, 64), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def source(tiny_checkpoint):
    return tiny_checkpoint(layers=2, head_dim=32, heads=4, kv_heads=2)


def measured(folder, **settings):
    model = load_model(folder, dtype=torch.float32, **settings)
    return collect(model, WINDOWS, weights_fingerprint=weights_fingerprint(folder), needs=ALL_NEEDS)


@pytest.fixture
def written(source, tmp_path):
    """Factory ``written(recipe, target="vllm", source=source) -> Path``."""

    def write(recipe, target="vllm", source=source, **settings):
        export(source, recipe, tmp_path / f"out-{target}", target=target, stats=measured(source), **settings)
        return tmp_path / f"out-{target}"

    return write


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def logits_of(model):
    with torch.no_grad():
        return model(WINDOWS[:1]).logits


@pytest.mark.parametrize(
    ("recipe", "changes", "dtype"),
    [
        ("int4", {}, "int4_per_token_head"),
        ("int8", {}, "int8_per_token_head"),
        ("int8", {"key.symmetric": True, "value.symmetric": True}, "int8_per_token_head"),
        ("fp8", {"key.scale": "unit", "value.scale": "unit"}, "fp8_per_token_head"),
        ("int4", FOLDS, "int4_per_token_head"),
        ("fp8", {}, None),
        ("int4", {"key.bits": 8}, None),
        ("int4", {"key.group": 16}, None),
        ("int4", {"tokens.window": 64}, None),
        ("int4", {"layers.0.key.bits": 8}, None),
        ("int4", {"value.clip": 0.9}, None),
        ("kivi4", {}, None),
    ],
)
def test_codecs_that_an_engine_stores_by_itself(recipe, changes, dtype):
    assert native_dtype(load_recipe(recipe).override(changes), find_release("vllm")) == dtype
    assert native_dtype(load_recipe(recipe).override(changes), find_release("sglang")) is None


def test_the_folder_is_a_checkpoint_of_the_base_architecture(written, source):
    """Loaded without kvq it gives the original's logits; nothing in it names a quantization."""
    out = written(INT4)
    assert "quantization_config" not in config_of(out)
    assert config_of(out)["architectures"] == config_of(source)["architectures"]
    assert not (out / "kv_scales.safetensors").exists()
    before, after = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (source, out))
    assert torch.allclose(logits_of(before), logits_of(after), atol=1e-4)
    name = "model.layers.0.self_attn.v_proj.weight"
    assert not torch.allclose(before.state_dict()[name], after.state_dict()[name], atol=1e-3)


def test_the_card_and_the_check_state_the_command(written):
    out = written(INT4)
    card = (out / "README.md").read_text()
    assert "```bash\nvllm serve out-vllm --kv-cache-dtype int4_per_token_head\n```" in card
    assert "--kv-cache-dtype int8_per_token_head" in card
    assert "`--kv-cache-dtype fp8` would use 1.0" in card
    found = {report.engine: report for report in check_folder(out, [find_release(name) for name in engines()])}
    assert all(report.errors == () for report in found.values())
    assert found["vllm"].serve == f"vllm serve {out} --kv-cache-dtype int4_per_token_head"
    assert found["vllm"].cache_dtype == "int4_per_token_head"
    assert found["sglang"].cache_dtype == "16 bits, as the model"
    assert found["sglang"].serve == f"python -m sglang.launch_server --model-path {out}"
    assert {report.scales.expected for report in found.values()} == {0}


def test_the_card_of_a_plain_folder_states_commands_too(written):
    card = (written(INT4, "plain") / "README.md").read_text()
    assert "```bash\nvllm serve out-plain --kv-cache-dtype int4_per_token_head\n```" in card
    other = load_recipe("kivi4").override({"transforms.value": [{"kind": "hadamard"}]})
    card = (written(other, "plain", force=True) / "README.md").read_text()
    assert "vllm serve out-plain\npython -m sglang.launch_server --model-path out-plain\n" in card


def test_every_file_that_is_lost_or_altered_is_an_error(written):
    out = written(INT4)
    releases = [find_release(name) for name in engines()]
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        content = path.read_bytes()
        middle = len(content) // 2
        one_bit = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        for fault in (None, one_bit, content[:-1]):
            path.unlink()
            if fault is not None:
                path.write_bytes(fault)
            assert all(report.errors for report in check_folder(out, releases)), (path.name, fault is None)
            path.write_bytes(content)
    assert not any(report.errors for report in check_folder(out, releases))


def test_what_needs_no_export_and_what_no_engine_stores(source, tmp_path, made_stats):
    def refuse(recipe, target, match):
        with pytest.raises(RecipeError, match=match):
            export(source, recipe, tmp_path / "out", target=target, stats=measured(source))
        assert not (tmp_path / "out").exists()

    refuse("int4", "vllm", "vllm serve MODEL --kv-cache-dtype int4_per_token_head")
    refuse(INT4, "sglang", "affine' with 4 bits.*--target vllm")
    refuse(INT4, "modelopt", "--target vllm")
    rotated = load_recipe("int4").override({"transforms.key": [{"kind": "hadamard"}]})
    refuse(rotated, "vllm", "'hadamard' of layer 0 stays.*mixes rotary pairs")


def test_a_fold_that_a_norm_forbids_is_refused_by_name(tiny_model, tiny_checkpoint, written):
    config = Qwen3Config(
        num_hidden_layers=1, hidden_size=64, head_dim=32, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=64, vocab_size=128, architectures=["Qwen3ForCausalLM"],
    )  # fmt: skip
    source = tiny_checkpoint(tiny_model(config), name="qwen")
    rotated = load_recipe("fp8").override({"transforms.key": [{"kind": "hadamard"}]})
    with pytest.raises(RecipeError, match="keys go through the transform 'hadamard' while the model runs, because"):
        written(rotated, source=source)


def test_windows_are_transformed_like_other_layers(tiny_model, tiny_checkpoint, written):
    """Engines quantize the cache of sliding-window layers too, so their weights take the rotation over as well."""
    config = Gemma3TextConfig(
        num_hidden_layers=2, hidden_size=64, head_dim=32, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=64, vocab_size=128, sliding_window=8, architectures=["Gemma3ForCausalLM"],
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    source = tiny_checkpoint(tiny_model(config), name="gemma")
    recipe = load_recipe("int4").override({"transforms.value": [{"kind": "hadamard"}]})
    before, after = (AutoModelForCausalLM.from_pretrained(f) for f in (source, written(recipe, source=source)))
    assert torch.allclose(logits_of(before), logits_of(after), atol=1e-4)
    for layer in (0, 1):
        name = f"model.layers.{layer}.self_attn.v_proj.weight"
        assert not torch.allclose(before.state_dict()[name], after.state_dict()[name], atol=1e-3)


@pytest.mark.parametrize("target", ENGINE_TARGETS)
def test_fp8_scales_are_those_of_what_the_folded_weights_compute(written, target):
    """Measured again on the checkpoint that was written: the largest number is stored as 448, not clipped."""
    out = written(FP8, target)
    scales = load_file(out / "kv_scales.safetensors")
    spelled = "{i}.self_attn.{s}_proj.{s}_scale" if target == "modelopt" else "{i}.self_attn.{s}_scale"
    stats = measured(out, config=simulated_config(out))
    for index, layer in stats.layers.items():
        for side in ("key", "value"):
            absmax = float(layer[f"{side}.range"].absmax.max())
            scale = float(scales[f"model.layers.{spelled.format(i=index, s=side[0])}"])
            assert absmax / 448 * (1 - 1e-4) <= scale <= absmax / 448 * (1 + 2**-7)
    for report in check_folder(out, [find_release(name) for name in TARGETS[target].engines]):
        assert report.errors == ()
    card = (out / "README.md").read_text()
    assert "with the transforms below folded in" in card
    assert "value transforms | hadamard" in card


def test_the_simulation_of_a_folded_folder_transforms_nothing_again(written):
    plan = simulated_plan(written(FP8))
    assert plan.recipe.transforms.to_dict() == {}
    assert not any(chain.steps for sides in plan.chains.values() for chain in sides.values())


@pytest.mark.parametrize("fields", [
    {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}},
    {"quant_method": "fp8", "activation_scheme": "dynamic"},
])  # fmt: skip
def test_quantized_weights_take_no_transforms_over(source, tmp_path, fields):
    stats = measured(source)
    (source / "config.json").write_text(json.dumps(config_of(source) | {"quantization_config": fields}))
    with pytest.raises(RecipeError, match="quantized weights would be rounded again"):
        export(source, FP8, tmp_path / "out", target="vllm", stats=stats)
    with pytest.raises(RecipeError, match="quantized weights would be rounded again"):
        export(source, INT4, tmp_path / "out", target="vllm", stats=stats)


def test_recipes_of_an_engine_say_how(source):
    spec = describe(load_config(source))
    assert express(INT4, find_release("vllm"), spec) == (
        "how: --target vllm, transforms in the weights, served with --kv-cache-dtype int4_per_token_head"
    )
    assert express(load_recipe("int4"), find_release("vllm"), spec).startswith("no: ")
    assert express(INT4, find_release("sglang"), spec).startswith("no: keys are stored by the codec 'affine'")
    assert express(FP8, find_release("sglang"), spec).startswith("how: --target sglang")
